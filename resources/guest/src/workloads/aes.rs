//! `pyaes`: AES-128-CTR, encryption and decryption, in an interpreter, as FunctionBench's `pyaes` (Python without a
//! native cipher). The cipher is the program `aes.txt`.

use alloc::vec;
use alloc::vec::Vec;

use super::interpreter::{Program, Value, compile};
use super::random::Random;
use super::runtime::Pace;
use crate::args::Message;
use crate::digest::Digest;
use crate::message;

/// Bytes of FaaSnap's inputs.
pub const BYTES_A: u64 = 20_000;
pub const BYTES_B: u64 = 22_000;
/// Whole blocks that the interpreter does between two steps of progress.
const PIECE: usize = 64 * 16;

fn numbers(bytes: &[u8]) -> Value {
    Value::list(bytes.iter().map(|byte| i64::from(*byte)))
}

fn bytes(value: &Value) -> Result<Vec<u8>, Message> {
    let Value::List(list) = value else {
        return Err(message!("aes: no list"));
    };
    let byte = |value: &Value| match value {
        Value::Number(number) => u8::try_from(*number).map_err(|_| message!("aes: {number} is no byte")),
        Value::List(_) => Err(message!("aes: a list in a list")),
    };
    list.borrow().iter().map(byte).collect()
}

/// `data` with the key stream of `key` and first counter block `counter`.
fn ctr(
    program: &Program,
    data: &[u8],
    key: &[u8],
    counter: &[u8],
    mut step: impl FnMut(usize),
) -> Result<Vec<u8>, Message> {
    let (key, counter) = (numbers(key), numbers(counter));
    let mut out = Vec::with_capacity(data.len());
    for piece in data.chunks(PIECE) {
        out.extend(bytes(&program.call("ctr", vec![numbers(piece), key.clone(), counter.clone()])?)?);
        step(out.len());
    }
    Ok(out)
}

/// Encrypts and decrypts `len` bytes of text; returns the digest of the encrypted bytes.
pub fn run(len: u64, seed: u64, pace: &mut Pace) -> Result<u64, Message> {
    let mut random = Random::new(seed);
    let mut block = || random.word().to_le_bytes().repeat(2);
    let (key, counter) = (block(), block());
    let text: Vec<u8> = (0..len).map(|_| b' ' + random.below(95) as u8).collect();
    let program = compile(include_str!("aes.txt"))?;
    let encrypted = ctr(&program, &text, &key, &counter, |done| pace.at(done as u64, 2 * len))?;
    let decrypted = ctr(&program, &encrypted, &key, &counter, |done| pace.at(len + done as u64, 2 * len))?;
    if decrypted != text {
        return Err(message!("aes: what was decrypted is not what was encrypted"));
    }
    let mut digest = Digest::new();
    digest.bytes(&encrypted);
    Ok(digest.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let text: String = text.split_whitespace().collect();
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn block_is_that_of_fips_197_appendix_c() {
        let program = compile(include_str!("aes.txt")).unwrap();
        let (key, block) = (hex("000102030405060708090a0b0c0d0e0f"), hex("00112233445566778899aabbccddeeff"));
        let out = program.call("ecb", vec![numbers(&block), numbers(&key)]).unwrap();
        assert_eq!(bytes(&out).unwrap(), hex("69c4e0d86a7b0430d8cdb78070b4c55a"));
    }

    #[test]
    fn counter_mode_is_that_of_sp_800_38a_appendix_f() {
        let program = compile(include_str!("aes.txt")).unwrap();
        let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
        let counter = hex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
        let plain = hex("6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51
                         30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710");
        let cipher = hex("874d6191b620e3261bef6864990db6ce 9806f66b7970fdff8617187bb9fffdff
                          5ae4df3edbd5d35e5b4f09020db03eab 1e031dda2fbe03d1792170a0f3009cee");
        for len in [64, 50, 16, 1, 0] {
            assert_eq!(ctr(&program, &plain[..len], &key, &counter, |_| ()).unwrap(), cipher[..len]);
        }
    }

    #[test]
    fn pieces_continue_the_key_stream() {
        let program = compile(include_str!("aes.txt")).unwrap();
        let (key, counter) = ([7; 16], [0xff; 16]);
        let stream = ctr(&program, &[0; PIECE * 2], &key, &counter, |_| ()).unwrap();
        let second = ctr(&program, &[0; 16], &key, &[0; 16], |_| ()).unwrap();
        // The counter wraps round to zero after the first block.
        assert_eq!(stream[16..32], second);
        assert_ne!(stream[..PIECE], stream[PIECE..]);
    }
}
