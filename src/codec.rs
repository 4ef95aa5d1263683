//! How messages become bytes: prost, with one difference.
//!
//! A message that cannot be decoded is the sender's mistake, so it is refused
//! with INVALID_ARGUMENT; tonic's own codec calls it INTERNAL, which clients
//! take for a fault of the server and retry.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstEncoder};

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
        U::decode(buffer).map(Some).map_err(|error| {
            Status::invalid_argument(format!(
                "the message cannot be decoded (text must be valid UTF-8): {error}"
            ))
        })
    }
}
