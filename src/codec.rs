//! How messages become bytes: prost, with two differences.
//!
//! A message that cannot be decoded is the sender's mistake, so it is refused
//! with INVALID_ARGUMENT; tonic's own codec calls it INTERNAL, which clients
//! take for a fault of the server and retry.
//!
//! A message of far more elements than any of ours has is refused before it is decoded: an empty element
//! takes two bytes on the wire and a hundred in memory.

use std::marker::PhantomData;

use bytes::Buf;
use prost::{
    Message,
    encoding::{DecodeContext, decode_key, skip_field},
};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstEncoder};

/// The fields that a message may have, each element of a list counted: more than the statements of the largest request.
const MAX_FIELDS: usize = 1 << 18;
/// A field takes as many bytes at least.
const MIN_FIELD_BYTES: usize = 2;

/// The codec of every service in `proto/`; see `build.rs`.
#[derive(Clone, Debug)]
pub struct MessageCodec<T, U> {
    types: PhantomData<(T, U)>,
}

impl<T, U> Default for MessageCodec<T, U> {
    fn default() -> Self {
        Self { types: PhantomData }
    }
}

impl<T, U> Codec for MessageCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        MessageDecoder { message: PhantomData }
    }
}

/// Decodes one message; see the module's words on errors.
#[derive(Debug)]
pub struct MessageDecoder<U> {
    message: PhantomData<U>,
}

impl<U: Message + Default> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let message = buffer.copy_to_bytes(buffer.remaining());
        if message.len() > MAX_FIELDS * MIN_FIELD_BYTES && has_too_many_fields(&message) {
            return Err(Status::resource_exhausted(format!(
                "the message has more than {MAX_FIELDS} elements: split the request"
            )));
        }
        U::decode(message).map(Some).map_err(|error| {
            Status::invalid_argument(format!(
                "the message cannot be decoded (text must be valid UTF-8): {error}"
            ))
        })
    }
}

/// What cannot be understood is left to the decoder to name.
fn has_too_many_fields(mut message: &[u8]) -> bool {
    for _ in 0..MAX_FIELDS {
        if message.is_empty() {
            return false;
        }
        let skipped = decode_key(&mut message)
            .and_then(|(tag, wire_type)| skip_field(wire_type, tag, &mut message, DecodeContext::default()));
        if skipped.is_err() {
            return false;
        }
    }
    !message.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ExecuteRequest, Statement};

    #[test]
    fn elements_are_counted_before_they_take_memory() {
        let request =
            |count| ExecuteRequest { statements: vec![Statement::default(); count], ..Default::default() };
        assert!(!has_too_many_fields(&request(MAX_FIELDS).encode_to_vec()));
        assert!(has_too_many_fields(&request(MAX_FIELDS + 1).encode_to_vec()));
        assert!(!has_too_many_fields(&[0xff; 100]), "that is for the decoder to refuse");
    }
}
