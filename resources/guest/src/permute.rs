//! Orders in which pages are visited: each yields distinct numbers below `total`.

use crate::digest::mix2;

/// A visiting order over `0..total`.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Stride(Stride),
    Shuffle(Shuffle),
}

impl Order {
    /// The `i`-th number, for `i < total`.
    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        match self {
            Self::Stride(s) => s.at(i),
            Self::Shuffle(s) => s.at(i),
        }
    }
}

/// `(i * stride) mod total`; whenever that cycle closes, on with the next offset.
#[derive(Clone, Copy, Debug)]
pub struct Stride {
    total: u64,
    stride: u64,
    cycle: u64,
}

impl Stride {
    /// `total` must be in `1..=2^32`: then no product overflows.
    pub fn new(total: u64, stride: u64) -> Self {
        assert!(total > 0 && total <= 1 << 32);
        let stride = stride % total;
        Self { total, stride, cycle: total / gcd(stride, total) }
    }

    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        let offset = i / self.cycle;
        (offset + i % self.cycle * self.stride) % self.total
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if a == 0 { b } else { gcd(b % a, a) }
}

/// A pseudo-random permutation of `0..total`: a four-round Feistel network over the next even
/// number of bits, walked again while it lands outside (cycle walking, Black and Rogaway 2002).
#[derive(Clone, Copy, Debug)]
pub struct Shuffle {
    total: u64,
    half_bits: u32,
    seed: u64,
}

impl Shuffle {
    /// `total` must be in `1..=2^62`.
    pub fn new(total: u64, seed: u64) -> Self {
        assert!(total > 0 && total <= 1 << 62);
        let bits = u64::BITS - (total - 1).leading_zeros();
        Self { total, half_bits: bits.div_ceil(2).max(1), seed }
    }

    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        let mut x = self.once(i);
        while x >= self.total {
            x = self.once(x);
        }
        x
    }

    #[inline]
    fn once(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..4 {
            let f = mix2(self.seed.wrapping_add(round), right) & mask;
            (left, right) = (right, left ^ f);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_permutation(total: u64, order: Order) {
        let mut seen = vec![false; total as usize];
        for i in 0..total {
            let p = order.at(i) as usize;
            assert!(!std::mem::replace(&mut seen[p], true), "{p} came twice");
        }
    }

    #[test]
    fn stride_visits_every_page_once() {
        for total in [1, 2, 3, 12, 97, 512, 1000] {
            for stride in [1, 2, 3, 4, 6, 97, 512, 1000, u64::MAX] {
                is_permutation(total, Order::Stride(Stride::new(total, stride)));
            }
        }
    }

    #[test]
    fn stride_one_is_in_order_and_stride_four_steps_by_four() {
        let one = Stride::new(10, 1);
        assert_eq!((0..10).map(|i| one.at(i)).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        let four = Stride::new(12, 4);
        assert_eq!((0..6).map(|i| four.at(i)).collect::<Vec<_>>(), [0, 4, 8, 1, 5, 9]);
    }

    #[test]
    fn shuffle_visits_every_page_once_and_depends_on_the_seed() {
        for total in [1, 2, 3, 4, 5, 64, 65, 1000, 4096, 5000] {
            is_permutation(total, Order::Shuffle(Shuffle::new(total, 1)));
        }
        let (a, b) = (Shuffle::new(1000, 1), Shuffle::new(1000, 2));
        assert!((0..1000).filter(|&i| a.at(i) == b.at(i)).count() < 50);
        assert!((0..1000).filter(|&i| a.at(i) == i).count() < 50);
    }
}
