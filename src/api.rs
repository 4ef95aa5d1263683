//! The generated gRPC messages, clients and servers of `proto/resqlite/v1`.

#![allow(missing_docs, reason = "generated; the .proto files carry the comments")]
#![allow(clippy::all, unused_qualifications, reason = "generated")]

tonic::include_proto!("resqlite.v1");

/// The encoded `FileDescriptorSet` of every proto file, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/resqlite.v1.descriptors"));
