//! Bit streams, least significant bit first, and LEB128 numbers: the encodings of a profile's sections.

/// Bits on their way into bytes.
#[derive(Debug, Default)]
pub struct BitWriter {
    bytes: Vec<u8>,
    used: u32,
}

impl BitWriter {
    /// Appends the low `count` (at most 64) bits of `value`.
    pub fn bits(&mut self, value: u64, count: u32) {
        for index in 0..count {
            if self.used == 0 {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((value >> index & 1) as u8) << self.used;
            }
            self.used = (self.used + 1) % 8;
        }
    }

    /// Appends a number of at least 1 in Elias' gamma code: as many zeros as it has bits after the first, a one, those
    /// bits. 1 takes one bit.
    pub fn gamma(&mut self, value: u64) {
        let rest = value.max(1).ilog2();
        self.bits(0, rest);
        self.bits(1, 1);
        self.bits(value, rest);
    }

    /// The bytes; the last one is filled with zeros.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Bits out of bytes. Every read checks for the end.
#[derive(Debug)]
pub struct BitReader<'a> {
    bytes: &'a [u8],
    at: u64,
}

impl<'a> BitReader<'a> {
    pub fn new(bytes: &'a [u8]) -> BitReader<'a> {
        BitReader { bytes, at: 0 }
    }

    fn bit(&mut self) -> Option<u64> {
        let byte = self.bytes.get(usize::try_from(self.at / 8).ok()?)?;
        let bit = byte >> (self.at % 8) & 1;
        self.at += 1;
        Some(u64::from(bit))
    }

    pub fn bits(&mut self, count: u32) -> Option<u64> {
        (0..count).try_fold(0, |value, index| Some(value | self.bit()?.checked_shl(index)?))
    }

    pub fn gamma(&mut self) -> Option<u64> {
        let mut rest = 0;
        while self.bit()? == 0 {
            rest += 1;
            if rest >= 64 {
                return None;
            }
        }
        Some(1 << rest | self.bits(rest)?)
    }

    /// True if nothing follows but the zeros that fill the last byte.
    pub fn is_finished(&mut self) -> bool {
        let left = self.bytes.len() as u64 * 8 - self.at;
        left < 8 && self.bits(left as u32) == Some(0)
    }
}

/// Appends a number in LEB128: seven bits a byte, the lowest first, the top bit set in all but the last.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the front. `None` for one that ends early, has more than 64 bits, or is longer than it need be.
pub fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let low = u64::from(byte & 0x7f);
        if shift == 63 && low > 1 {
            return None;
        }
        value |= low << shift;
        if byte & 0x80 == 0 {
            return (byte != 0 || shift == 0).then_some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_come_back(values in prop::collection::vec((1_u64.., 1_u32..=64), 0..50)) {
            let mut bits = BitWriter::default();
            let mut bytes = Vec::new();
            for &(value, count) in &values {
                bits.bits(value, count);
                bits.gamma(value);
                put_varint(&mut bytes, value);
            }
            let packed = bits.finish();
            let mut reader = BitReader::new(&packed);
            let mut rest = bytes.as_slice();
            for &(value, count) in &values {
                prop_assert_eq!(reader.bits(count), Some(value & u64::MAX >> (64 - count)));
                prop_assert_eq!(reader.gamma(), Some(value));
                prop_assert_eq!(take_varint(&mut rest), Some(value));
            }
            prop_assert!(reader.is_finished() && rest.is_empty());
        }
    }

    #[test]
    fn malformed_numbers_are_refused() {
        for bytes in [&[][..], &[0x80], &[0x80, 0], &[0xff; 10], &[0xff; 9]] {
            assert_eq!(take_varint(&mut &*bytes), None, "{bytes:?}");
        }
        assert_eq!(BitReader::new(&[0; 9]).gamma(), None);
        assert!(!BitReader::new(&[0]).is_finished());
        assert!(!BitReader::new(&[2, 0]).is_finished());
    }
}
