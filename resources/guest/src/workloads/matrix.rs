//! Dense matrix product in blocks that fit the caches (Goto and van de Geijn 2008), for `matmul` (f64) and the
//! convolutions of `recognition` (f32). No fused multiply-add and a fixed order of sums: the same bits on every CPU.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::{Add, Mul};

use super::random::Random;
use super::runtime::Pace;
use crate::digest::Digest;

/// Rows that the innermost loop works on.
const MR: usize = 4;
/// Rows of `b` in a block.
const KC: usize = 256;
/// Columns of `b` in a block, a multiple of every `NR`.
const NC: usize = 512;
/// Columns that the innermost loop works on: two SSE registers each.
pub const NR_F64: usize = 4;
pub const NR_F32: usize = 8;

/// The elements of a matrix.
pub trait Real: Copy + Default + Add<Output = Self> + Mul<Output = Self> {}
impl Real for f64 {}
impl Real for f32 {}

/// Rows of the left matrix, its columns (rows of the right one), columns of the right one.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// `c += a · b`, all in rows one after the other. Calls `step` after each block with the number of blocks done and to
/// do.
pub fn multiply_add<T: Real, const NR: usize>(
    a: &[T],
    b: &[T],
    c: &mut [T],
    Shape { m, k, n }: Shape,
    mut step: impl FnMut(u64, u64),
) {
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    let mut packed_b = vec![T::default(); KC.min(k) * NC.min(n.next_multiple_of(NR))];
    let mut packed_a = vec![T::default(); KC.min(k) * MR];
    let blocks = n.div_ceil(NC) * k.div_ceil(KC);
    let mut done = 0;
    for left in (0..n).step_by(NC) {
        let nc = NC.min(n - left);
        for top in (0..k).step_by(KC) {
            let kc = KC.min(k - top);
            let panels = nc.div_ceil(NR);
            pack_b::<T, NR>(&b[top * n..(top + kc) * n], n, left, nc, &mut packed_b[..panels * kc * NR]);
            for row in (0..m).step_by(MR) {
                let rows = MR.min(m - row);
                pack_a(&a[row * k..(row + rows) * k], k, top, &mut packed_a[..kc * MR]);
                for (panel, b) in packed_b[..panels * kc * NR].chunks_exact(kc * NR).enumerate() {
                    let product = kernel::<T, NR>(&packed_a[..kc * MR], b);
                    let columns = NR.min(nc - panel * NR);
                    for (i, sums) in product.iter().enumerate().take(rows) {
                        let at = (row + i) * n + left + panel * NR;
                        c[at..at + columns].iter_mut().zip(sums).for_each(|(to, sum)| *to = *to + *sum);
                    }
                }
            }
            done += 1;
            step(done, blocks as u64);
        }
    }
}

/// Columns `left..left + nc` of the rows `b`, in panels of `NR` columns, filled up with zeros.
fn pack_b<T: Real, const NR: usize>(b: &[T], n: usize, left: usize, nc: usize, packed: &mut [T]) {
    let kc = b.len() / n;
    for (panel, to) in packed.chunks_exact_mut(kc * NR).enumerate() {
        let columns = NR.min(nc - panel * NR);
        for (row, to) in b.chunks_exact(n).zip(to.chunks_exact_mut(NR)) {
            let at = left + panel * NR;
            to[..columns].copy_from_slice(&row[at..at + columns]);
            to[columns..].fill(T::default());
        }
    }
}

/// Columns from `top` on of up to `MR` rows `a`, column by column, filled up with zeros.
fn pack_a<T: Real>(a: &[T], k: usize, top: usize, packed: &mut [T]) {
    let rows = a.len() / k;
    for (column, to) in packed.chunks_exact_mut(MR).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = if i < rows { a[i * k + top + column] } else { T::default() };
        }
    }
}

#[inline(always)]
fn kernel<T: Real, const NR: usize>(a: &[T], b: &[T]) -> [[T; NR]; MR] {
    let mut sums = [[T::default(); NR]; MR];
    for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = sums[i][j] + a[i] * b[j];
            }
        }
    }
    sums
}

/// `matmul`: multiplies two matrices of n × n random numbers in 0..1; returns the digest of the product.
pub fn matmul(n: u64, seed: u64, pace: &mut Pace) -> u64 {
    let n = n as usize;
    let mut random = Random::new(seed);
    let mut matrix = || -> Vec<f64> { (0..n * n).map(|_| random.unit()).collect() };
    let (a, b) = (matrix(), matrix());
    let mut c = vec![0.0; n * n];
    multiply_add::<f64, NR_F64>(&a, &b, &mut c, Shape { m: n, k: n, n }, |done, total| pace.at(done, total));
    let mut digest = Digest::new();
    c.iter().for_each(|sum| digest.word(sum.to_bits()));
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, seed: u64) -> Vec<f64> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.unit() - 0.5).collect()
    }

    fn naive(a: &[f64], b: &[f64], Shape { m, k, n }: Shape) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum();
        (0..m * n).map(|index| at(index / n, index % n)).collect()
    }

    #[test]
    fn product_is_that_of_the_naive_sum_at_every_edge() {
        for (m, k, n) in [(1, 1, 1), (4, 4, 4), (5, 7, 3), (3, 257, 5), (6, 300, 515), (33, 512, 17), (9, 600, 1030)] {
            let shape = Shape { m, k, n };
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let expected = naive(&a, &b, shape);
            let mut c = vec![1.0; m * n];
            multiply_add::<f64, NR_F64>(&a, &b, &mut c, shape, |_, _| ());
            assert!(c.iter().zip(&expected).all(|(x, y)| (x - 1.0 - y).abs() < 1e-10), "{shape:?}");
            let [a32, b32] = [&a, &b].map(|m| m.iter().map(|x| *x as f32).collect::<Vec<f32>>());
            let mut c = vec![0.0; m * n];
            multiply_add::<f32, NR_F32>(&a32, &b32, &mut c, shape, |_, _| ());
            assert!(c.iter().zip(&expected).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-3), "{shape:?}");
        }
    }
}
