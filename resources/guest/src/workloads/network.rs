//! `recognition`: one picture through a network of the shape of ResNet-50 (He, Zhang, Ren, Sun 2016, table 1; stride in
//! the 3×3 convolutions, as in today's frameworks). 25.5 million weights, 102 MB. The weights are random, so the
//! recognised class means nothing, but the computation and the memory it touches are those of the real network. Batch
//! normalisation is folded into the weights, as for inference.

use alloc::vec;
use alloc::vec::Vec;

use zune_core::colorspace::ColorSpace;

use super::image::Picture;
use super::matrix::{NR_F32, Shape, multiply_add};
use super::random::Random;
use super::runtime::Pace;
use crate::args::Message;
use crate::digest::Digest;
use crate::message;

/// Side of the input.
pub const SIDE: usize = 224;
pub const CLASSES: usize = 1000;
/// Blocks and inner channels of the four stages.
const STAGES: [(usize, usize); 4] = [(3, 64), (4, 128), (6, 256), (3, 512)];
/// Convolutions and the last layer, for the progress.
const LAYERS: u64 = 54;

/// One convolution.
#[derive(Clone, Copy, Debug)]
struct Conv {
    from: usize,
    to: usize,
    kernel: usize,
    stride: usize,
}

impl Conv {
    /// Weights of one output channel.
    const fn fan_in(&self) -> usize {
        self.from * self.kernel * self.kernel
    }

    const fn weights(&self) -> usize {
        self.to * self.fan_in()
    }

    const fn padding(&self) -> usize {
        self.kernel / 2
    }

    fn out_side(&self, side: usize) -> usize {
        (side + 2 * self.padding() - self.kernel) / self.stride + 1
    }
}

const STEM: Conv = Conv { from: 3, to: 64, kernel: 7, stride: 2 };
const LAST: usize = 2048;

/// The convolutions of a bottleneck block; the fourth is that of the short cut, where the shape changes.
fn block(from: usize, inner: usize, stride: usize) -> ([Conv; 3], Option<Conv>) {
    let to = 4 * inner;
    let main = [
        Conv { from, to: inner, kernel: 1, stride: 1 },
        Conv { from: inner, to: inner, kernel: 3, stride },
        Conv { from: inner, to, kernel: 1, stride: 1 },
    ];
    (main, (from != to).then_some(Conv { from, to, kernel: 1, stride }))
}

/// All blocks in order: input channels, inner channels, stride.
fn blocks() -> impl Iterator<Item = (usize, usize, usize)> {
    let mut from = STEM.to;
    STAGES
        .into_iter()
        .enumerate()
        .flat_map(|(stage, (count, inner))| {
            (0..count).map(move |index| (inner, if index == 0 && stage > 0 { 2 } else { 1 }))
        })
        .map(move |(inner, stride)| {
            let block = (from, inner, stride);
            from = 4 * inner;
            block
        })
}

/// Channels of square planes.
#[derive(Clone, Debug)]
pub struct Planes {
    channels: usize,
    side: usize,
    values: Vec<f32>,
}

/// Means and deviations of the channels of ImageNet, by which every ResNet-50 expects its input.
const MEANS: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATIONS: [f32; 3] = [0.229, 0.224, 0.225];
/// The shorter side of a picture before its middle is cut out.
const RESIZED: f32 = 256.0;

impl Planes {
    /// The middle of a picture (RGB), as a square of `side` pixels, after its shorter side was made 8/7 of that (256
    /// for 224), with channels in units of their deviation. In between, by the four nearest pixels.
    pub fn of(picture: &Picture, side: usize) -> Self {
        let (width, height) = (usize::from(picture.width), usize::from(picture.height));
        let step = width.min(height) as f32 / (RESIZED * side as f32 / SIDE as f32);
        // Position and weight of the second of two neighbours, in a line of `len` pixels.
        let place = |len: usize, at: usize| {
            let middle = (at as f32 + 0.5 - side as f32 / 2.0) * step + len as f32 / 2.0 - 0.5;
            let middle = middle.clamp(0.0, (len - 1) as f32);
            let first = (middle as usize).min(len.saturating_sub(2));
            (first, middle - first as f32)
        };
        let mut values = vec![0.0; 3 * side * side];
        for (y, x) in (0..side * side).map(|i| (i / side, i % side)) {
            let ((left, right_part), (top, bottom_part)) = (place(width, x), place(height, y));
            for channel in 0..3 {
                let at = |dx: usize, dy: usize| {
                    let (x, y) = ((left + dx).min(width - 1), (top + dy).min(height - 1));
                    f32::from(picture.bytes[(y * width + x) * 3 + channel])
                };
                let row = |dy: usize| at(0, dy) * (1.0 - right_part) + at(1, dy) * right_part;
                let value = (row(0) * (1.0 - bottom_part) + row(1) * bottom_part) / 255.0;
                values[(channel * side + y) * side + x] = (value - MEANS[channel]) / DEVIATIONS[channel];
            }
        }
        Self { channels: 3, side, values }
    }
}

/// The weights, in the order in which they are used: of each convolution its matrix and its biases.
pub struct Weights(Vec<f32>);

impl Weights {
    /// Random weights that keep the variance (He, Zhang, Ren, Sun 2015), less at the end of a block.
    pub fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut values = Vec::with_capacity(Self::count());
        let mut layer = |count: usize, outputs: usize, gain: f64| {
            let bound = gain * libm::sqrt(6.0 / (count / outputs) as f64);
            // Two from each word: 32 bits are more than enough.
            let mut word = 0;
            values.extend((0..count).map(|i| {
                word = if i % 2 == 0 { random.word() } else { word >> 32 };
                ((f64::from(word as u32) / f64::from(u32::MAX) * 2.0 - 1.0) * bound) as f32
            }));
            values.extend((0..outputs).map(|_| (random.unit() * 0.02 - 0.01) as f32));
        };
        layer(STEM.weights(), STEM.to, 1.0);
        for (from, inner, stride) in blocks() {
            let (main, short) = block(from, inner, stride);
            for (index, conv) in main.iter().enumerate() {
                layer(conv.weights(), conv.to, if index == 2 { 0.5 } else { 1.0 });
            }
            short.iter().for_each(|conv| layer(conv.weights(), conv.to, 0.7));
        }
        layer(CLASSES * LAST, CLASSES, 0.5);
        Self(values)
    }

    /// The number of weights.
    pub fn count() -> usize {
        let convs = blocks().flat_map(|(from, inner, stride)| {
            let (main, short) = block(from, inner, stride);
            main.into_iter().chain(short)
        });
        let convs: usize = convs.chain([STEM]).map(|conv| conv.weights() + conv.to).sum();
        convs + CLASSES * LAST + CLASSES
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.0[..]) as u64
    }
}

/// A convolution: of planes by weights and biases.
type Compute = fn(Conv, &Planes, &[f32], &[f32]) -> Planes;

/// A run through the network.
struct Run<'a, 'b, 'c> {
    weights: &'a [f32],
    compute: Compute,
    done: u64,
    pace: &'b mut Pace<'c>,
}

impl<'a> Run<'a, '_, '_> {
    fn take(&mut self, count: usize) -> &'a [f32] {
        let (taken, rest) = self.weights.split_at(count);
        self.weights = rest;
        taken
    }

    fn conv(&mut self, conv: Conv, input: &Planes) -> Planes {
        let weights = self.take(conv.weights());
        let biases = self.take(conv.to);
        let out = (self.compute)(conv, input, weights, biases);
        self.done += 1;
        self.pace.at(self.done, LAYERS);
        out
    }

    /// One bottleneck block.
    fn block(&mut self, input: Planes, inner: usize, stride: usize) -> Planes {
        let (main, short) = block(input.channels, inner, stride);
        let mut out = self.conv(main[0], &input);
        relu(&mut out);
        out = self.conv(main[1], &out);
        relu(&mut out);
        out = self.conv(main[2], &out);
        let short = short.map_or(input.clone(), |conv| self.conv(conv, &input));
        out.values.iter_mut().zip(&short.values).for_each(|(to, add)| *to += add);
        relu(&mut out);
        out
    }

    /// The values of the classes.
    fn network(&mut self, picture: &Planes) -> Vec<f32> {
        let mut planes = self.conv(STEM, picture);
        relu(&mut planes);
        planes = max_pool(&planes);
        for (_, inner, stride) in blocks() {
            planes = self.block(planes, inner, stride);
        }
        let area = planes.side * planes.side;
        let means: Vec<f32> = planes.values.chunks_exact(area).map(|p| p.iter().sum::<f32>() / area as f32).collect();
        let weights = self.take(CLASSES * LAST);
        let mut classes = self.take(CLASSES).to_vec();
        let shape = Shape { m: CLASSES, k: LAST, n: 1 };
        multiply_add::<f32, NR_F32>(weights, &means, &mut classes, shape, |_, _| ());
        self.pace.at(LAYERS, LAYERS);
        classes
    }
}

fn relu(planes: &mut Planes) {
    planes.values.iter_mut().for_each(|value| *value = value.max(0.0));
}

/// The largest of 3 × 3, in steps of 2, with a border of 1.
fn max_pool(input: &Planes) -> Planes {
    let side = input.side.div_ceil(2);
    let mut values = Vec::with_capacity(input.channels * side * side);
    for plane in input.values.chunks_exact(input.side * input.side) {
        for (y, x) in (0..side * side).map(|i| (i / side, i % side)) {
            let near = |at: usize| (2 * at).saturating_sub(1)..(2 * at + 2).min(input.side);
            let window = near(y).flat_map(|row| &plane[row * input.side..][near(x)]);
            values.push(window.fold(f32::MIN, |largest, value| largest.max(*value)));
        }
    }
    Planes { channels: input.channels, side, values }
}

/// A convolution as a matrix product: every window of the input becomes a column (Chellapilla et al. 2006).
fn convolve(conv: Conv, input: &Planes, weights: &[f32], biases: &[f32]) -> Planes {
    let side = conv.out_side(input.side);
    let area = side * side;
    let mut values: Vec<f32> = biases.iter().flat_map(|bias| core::iter::repeat_n(*bias, area)).collect();
    let shape = Shape { m: conv.to, k: conv.fan_in(), n: area };
    if conv.kernel == 1 && conv.stride == 1 {
        multiply_add::<f32, NR_F32>(weights, &input.values, &mut values, shape, |_, _| ());
    } else {
        let columns = windows(conv, input, side);
        multiply_add::<f32, NR_F32>(weights, &columns, &mut values, shape, |_, _| ());
    }
    Planes { channels: conv.to, side, values }
}

/// The matrix of windows: a row for each weight of an output channel, a column for each output pixel.
fn windows(conv: Conv, input: &Planes, side: usize) -> Vec<f32> {
    let mut columns = vec![0.0; conv.fan_in() * side * side];
    for (row, to) in columns.chunks_exact_mut(side * side).enumerate() {
        let (channel, dy, dx) = (row / (conv.kernel * conv.kernel), row / conv.kernel % conv.kernel, row % conv.kernel);
        let plane = &input.values[channel * input.side * input.side..][..input.side * input.side];
        for (y, to) in to.chunks_exact_mut(side).enumerate() {
            let from_y = (y * conv.stride + dy).wrapping_sub(conv.padding());
            if from_y >= input.side {
                continue;
            }
            let line = &plane[from_y * input.side..][..input.side];
            for (x, to) in to.iter_mut().enumerate() {
                let from_x = (x * conv.stride + dx).wrapping_sub(conv.padding());
                *to = line.get(from_x).copied().unwrap_or(0.0);
            }
        }
    }
    columns
}

/// Classifies a JPEG; returns the digest of the values of all classes, and the class with the largest.
pub fn run(weights: &Weights, jpeg: &[u8], pace: &mut Pace) -> Result<(u64, u64), Message> {
    let picture = Planes::of(&Picture::decode(jpeg, ColorSpace::RGB)?, SIDE);
    let mut run = Run { weights: &weights.0, compute: convolve, done: 0, pace };
    let classes = run.network(&picture);
    if classes.iter().any(|value| !value.is_finite()) {
        return Err(message!("recognition: a value is not finite"));
    }
    let mut digest = Digest::new();
    classes.iter().for_each(|value| digest.word(u64::from(value.to_bits())));
    let best =
        classes.iter().enumerate().fold(0, |best, (class, value)| if *value > classes[best] { class } else { best });
    Ok((digest.finish(), best as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::runtime::Touches;

    /// Sum by sum, as the definition says.
    fn direct(conv: Conv, input: &Planes, weights: &[f32], biases: &[f32]) -> Planes {
        let side = conv.out_side(input.side);
        let mut values = Vec::new();
        for (to, y, x) in (0..conv.to * side * side).map(|i| (i / (side * side), i / side % side, i % side)) {
            let mut sum = f64::from(biases[to]);
            for (from, dy, dx) in (0..conv.fan_in())
                .map(|i| (i / (conv.kernel * conv.kernel), i / conv.kernel % conv.kernel, i % conv.kernel))
            {
                let at = |out: usize, d: usize| (out * conv.stride + d).checked_sub(conv.padding());
                if let (Some(row), Some(column)) = (at(y, dy), at(x, dx))
                    && row < input.side
                    && column < input.side
                {
                    let weight = weights[to * conv.fan_in() + (from * conv.kernel + dy) * conv.kernel + dx];
                    let value = input.values[(from * input.side + row) * input.side + column];
                    sum += f64::from(weight) * f64::from(value);
                }
            }
            values.push(sum as f32);
        }
        Planes { channels: conv.to, side, values }
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        let scale = b.iter().fold(1e-3_f32, |scale, value| scale.max(value.abs()));
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < scale * 1e-3)
    }

    fn planes(side: usize) -> Planes {
        Planes::of(&Picture::synthetic(90, 60, 20, 2), side)
    }

    #[test]
    fn picture_is_resized_cut_and_scaled() {
        // As large as its resized self: the middle is cut out.
        let picture = Picture { width: 300, height: 256, bytes: (0..300 * 256 * 3).map(|i| (i % 251) as u8).collect() };
        let planes = Planes::of(&picture, SIDE);
        for (channel, x, y) in [(0, 0, 0), (1, 223, 0), (2, 100, 223)] {
            let byte = picture.bytes[((y + 16) * 300 + x + 38) * 3 + channel];
            let expected = (f32::from(byte) / 255.0 - MEANS[channel]) / DEVIATIONS[channel];
            assert!((planes.values[(channel * SIDE + y) * SIDE + x] - expected).abs() < 1e-4);
        }
        // Half the size of a picture of one colour in its left and one in its right half: the edge is in the middle.
        let bytes = (0..512 * 512).flat_map(|i| [if i % 512 < 256 { 10 } else { 200 }; 3]).collect();
        let planes = Planes::of(&Picture { width: 512, height: 512, bytes }, SIDE);
        let value = |x: usize| ((planes.values[x] * DEVIATIONS[0] + MEANS[0]) * 255.0 + 0.5) as u8;
        assert_eq!([value(0), value(111), value(112), value(223)], [10, 10, 200, 200]);
        // One pixel is enough.
        assert_eq!(Planes::of(&Picture { width: 1, height: 1, bytes: vec![9; 3] }, 4).values.len(), 48);
    }

    #[test]
    fn network_has_the_published_number_of_weights() {
        // 25,557,032 with two numbers of each of 26,560 batch normalisations, of which one is left when they are
        // folded.
        assert_eq!(Weights::count(), 25_557_032 - 26_560);
        assert_eq!(blocks().count(), 16);
    }

    #[test]
    fn convolutions_are_those_of_the_definition() {
        let mut random = Random::new(1);
        for (kernel, stride, side) in [(1, 1, 6), (1, 2, 7), (3, 1, 6), (3, 2, 9), (7, 2, 11)] {
            let conv = Conv { from: 3, to: 5, kernel, stride };
            let input = planes(side);
            let [weights, biases] =
                [conv.weights(), conv.to].map(|len| (0..len).map(|_| random.unit() as f32 - 0.5).collect::<Vec<_>>());
            let (fast, slow) = (convolve(conv, &input, &weights, &biases), direct(conv, &input, &weights, &biases));
            assert_eq!(fast.side, slow.side);
            assert!(close(&fast.values, &slow.values), "{conv:?}");
        }
    }

    #[test]
    fn pool_takes_the_largest_of_its_window() {
        let values = (0..9).map(|i| i as f32).collect();
        assert_eq!(max_pool(&Planes { channels: 1, side: 3, values }).values, [4.0, 5.0, 7.0, 8.0]);
    }

    #[test]
    fn whole_network_on_a_small_picture_is_that_of_direct_sums() {
        let weights = Weights::random(1);
        assert_eq!(weights.0.len(), Weights::count());
        let picture = planes(32);
        let classes = |compute: Compute| {
            let mut pace = Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0);
            let mut run = Run { weights: &weights.0, compute, done: 0, pace: &mut pace };
            let classes = run.network(&picture);
            assert!(run.weights.is_empty());
            assert_eq!(run.done + 1, LAYERS);
            classes
        };
        let (fast, slow) = (classes(convolve), classes(direct));
        assert!(close(&fast, &slow));
        assert!(fast.iter().any(|value| value.abs() > 1e-3));
    }
}
