//! Compiles `proto/` into Rust with protox, so that no `protoc` has to be installed.

use std::{env, error::Error, path::PathBuf};

use protox::Compiler;

const PROTOS: [&str; 4] =
    ["resqlite/v1/raft.proto", "resqlite/v1/log.proto", "resqlite/v1/sql.proto", "resqlite/v1/request.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(PROTOS)?;

    // sqlited serves the descriptors through gRPC server reflection.
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("resqlite.v1.descriptors"), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::MessageCodec")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
