//! Hashes: a mixer for patterns and choices, and digests over words.

/// Finaliser of MurmurHash3: a bijection on u64 in which every input bit moves every output bit.
#[inline(always)]
pub const fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hash of two numbers in order.
#[inline(always)]
pub const fn mix2(a: u64, b: u64) -> u64 {
    mix(mix(a.wrapping_add(GOLDEN)) ^ b.wrapping_mul(GOLDEN))
}

/// Digest over a sequence of words, one at a time.
#[derive(Clone, Copy, Debug)]
pub struct Digest(u64);

impl Digest {
    pub const fn new() -> Self {
        Self(GOLDEN)
    }

    #[inline(always)]
    pub fn word(&mut self, w: u64) {
        self.0 = (self.0.rotate_left(29) ^ w).wrapping_mul(GOLDEN);
    }

    /// Adds bytes, then their count, so that no two texts run into each other.
    pub fn bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut w = [0; 8];
            w[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(w));
        }
        self.word(bytes.len() as u64);
    }

    pub fn finish(self) -> u64 {
        mix(self.0)
    }
}

impl Default for Digest {
    fn default() -> Self {
        Self::new()
    }
}

const LANES: usize = 8;

/// Digest over whole pages in eight independent lanes, so that the multiplier's latency is hidden
/// and memory is the limit. Word `i` of a page goes to lane `i % 8`.
#[derive(Clone, Copy, Debug)]
pub struct PageDigest {
    lanes: [u64; LANES],
    pages: u64,
}

impl PageDigest {
    pub const fn new() -> Self {
        let mut lanes = [0; LANES];
        let mut i = 0;
        while i < LANES {
            lanes[i] = mix(GOLDEN.wrapping_mul(i as u64 + 1));
            i += 1;
        }
        Self { lanes, pages: 0 }
    }

    #[inline]
    pub fn page(&mut self, words: &[u64; crate::PAGE_WORDS as usize]) {
        let mut lanes = self.lanes;
        for group in words.as_chunks::<LANES>().0 {
            for (lane, w) in lanes.iter_mut().zip(group) {
                *lane = (*lane ^ w).wrapping_mul(GOLDEN).rotate_left(29);
            }
        }
        self.lanes = lanes;
        self.pages += 1;
    }

    pub fn finish(self) -> u64 {
        let mut d = Digest::new();
        for lane in self.lanes {
            d.word(lane);
        }
        d.word(self.pages);
        d.finish()
    }
}

impl Default for PageDigest {
    fn default() -> Self {
        Self::new()
    }
}

/// Word `word` of page `page` of a fill with `seed`: never zero, not compressible.
#[inline(always)]
pub const fn pattern(page_key: u64, word: u64) -> u64 {
    let x = mix(page_key.wrapping_add(word.wrapping_mul(GOLDEN)));
    if x == 0 { GOLDEN } else { x }
}

/// Key of one page of a fill, for [`pattern`].
pub const fn page_key(seed: u64, page: u64) -> u64 {
    mix2(seed, page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_digest_sees_every_word_and_the_order_of_pages() {
        let a = [7; 512];
        let mut b = a;
        b[509] ^= 1 << 63;
        let of = |pages: &[&[u64; 512]]| {
            let mut d = PageDigest::new();
            pages.iter().for_each(|p| d.page(p));
            d.finish()
        };
        assert_ne!(of(&[&a]), of(&[&b]));
        assert_ne!(of(&[&a, &b]), of(&[&b, &a]));
        assert_ne!(of(&[&a]), of(&[&a, &a]));
        let mut swapped = b;
        swapped.swap(501, 509); // same lane, other position
        assert_ne!(of(&[&b]), of(&[&swapped]));
    }

    #[test]
    fn pattern_is_never_zero_and_differs_between_pages_and_seeds() {
        let mut seen = std::collections::HashSet::new();
        for seed in 0..4 {
            for page in 0..4 {
                for word in 0..512 {
                    let w = pattern(page_key(seed, page), word);
                    assert_ne!(w, 0);
                    assert!(seen.insert(w));
                }
            }
        }
    }

    #[test]
    fn digest_of_bytes_depends_on_the_length() {
        let of = |b: &[u8]| {
            let mut d = Digest::new();
            d.bytes(b);
            d.finish()
        };
        assert_ne!(of(b"a"), of(b"a\0"));
        assert_ne!(of(b""), of(b"\0"));
    }
}
