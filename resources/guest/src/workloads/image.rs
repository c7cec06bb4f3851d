//! `image`: decode a JPEG, rotate by 90, 180 and 270 degrees, encode each, as FunctionBench's `image_processing`.

use alloc::vec;
use alloc::vec::Vec;

use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::random::Random;
use super::runtime::Pace;
use crate::args::Message;
use crate::digest::Digest;
use crate::message;

/// Quality of the encoded pictures: Pillow's default.
const QUALITY: u8 = 75;

/// An input: its size in pixels and about how many bytes its JPEG has.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub width: u16,
    pub height: u16,
    pub bytes: u64,
}

pub const A: Shape = Shape { width: 689, height: 689, bytes: 102_796 };
pub const B: Shape = Shape { width: 1000, height: 1500, bytes: 109_640 };

impl Shape {
    /// A square of about `bytes` bytes of JPEG, with as many pixels per byte as [`A`].
    pub fn of_bytes(bytes: u64) -> Self {
        let side = libm::sqrt(bytes as f64 * 689.0 * 689.0 / A.bytes as f64) as u16;
        Self { width: side, height: side, bytes }
    }
}

/// Three bytes a pixel, RGB or YCbCr.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub width: u16,
    pub height: u16,
    pub bytes: Vec<u8>,
}

impl Picture {
    /// Soft hills of colour with grain, `grain` 0 to 255.
    pub fn synthetic(width: u16, height: u16, grain: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let hills: [[i64; 4]; 6] = core::array::from_fn(|_| {
            let mut below = |n: u64| random.below(n.max(1)) as i64;
            [below(u64::from(width)), below(u64::from(height)), 40 + below(300), below(3)]
        });
        let mut bytes = Vec::with_capacity(usize::from(width) * usize::from(height) * 3);
        for y in 0..i64::from(height) {
            for x in 0..i64::from(width) {
                let mut pixel = [x * 120 / i64::from(width) + 40, y * 120 / i64::from(height) + 40, (x + y) % 256 / 2];
                for [hx, hy, radius, channel] in hills {
                    let distance = (x - hx) * (x - hx) + (y - hy) * (y - hy);
                    pixel[channel as usize] += 90 * radius * radius / (radius * radius + distance);
                }
                let noise = if grain == 0 { 0 } else { random.below(grain) as i64 - grain as i64 / 2 };
                bytes.extend(pixel.map(|channel| (channel + noise).clamp(0, 255) as u8));
            }
        }
        Self { width, height, bytes }
    }

    fn pixel(&self, x: usize, y: usize) -> &[u8] {
        let at = (y * usize::from(self.width) + x) * 3;
        &self.bytes[at..at + 3]
    }

    /// Turned clockwise by this many quarters.
    pub fn rotated(&self, quarters: u32) -> Self {
        let (w, h) = (usize::from(self.width), usize::from(self.height));
        let (width, height) = if quarters % 2 == 1 { (self.height, self.width) } else { (self.width, self.height) };
        let mut bytes = vec![0; self.bytes.len()];
        for (index, to) in bytes.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (x, y) = (index % usize::from(width), index / usize::from(width));
            let from = match quarters % 4 {
                0 => self.pixel(x, y),
                1 => self.pixel(y, h - 1 - x),
                2 => self.pixel(w - 1 - x, h - 1 - y),
                _ => self.pixel(w - 1 - y, x),
            };
            to.copy_from_slice(from);
        }
        Self { width, height, bytes }
    }

    /// Left and right exchanged.
    pub fn flipped(&self) -> Self {
        let mut bytes = Vec::with_capacity(self.bytes.len());
        for row in self.bytes.chunks_exact(usize::from(self.width) * 3) {
            row.as_chunks::<3>().0.iter().rev().for_each(|pixel| bytes.extend(pixel));
        }
        Self { bytes, ..*self }
    }

    /// As a baseline JPEG with 4:2:0 chroma; `kind` is the format of the bytes.
    pub fn encode(&self, kind: ColorType, quality: u8) -> Result<Vec<u8>, Message> {
        let mut out = Vec::new();
        let mut encoder = Encoder::new(&mut out, quality);
        encoder.set_sampling_factor(SamplingFactor::F_2_2);
        encoder.encode(&self.bytes, self.width, self.height, kind).map_err(|error| message!("JPEG: {error}"))?;
        Ok(out)
    }

    /// The best JPEG of this picture that has at most `bytes` bytes, and its quality; else one of quality 1.
    pub fn encode_within(&self, kind: ColorType, bytes: u64) -> Result<(Vec<u8>, u8), Message> {
        let (mut low, mut high) = (1, 100);
        let mut best = (self.encode(kind, low)?, low);
        while low < high {
            let quality = (low + high).div_ceil(2);
            let encoded = self.encode(kind, quality)?;
            if encoded.len() as u64 <= bytes {
                (low, best) = (quality, (encoded, quality));
            } else {
                high = quality - 1;
            }
        }
        Ok(best)
    }

    /// Decodes a JPEG into pixels of `space`, RGB or YCbCr.
    pub fn decode(jpeg: &[u8], space: ColorSpace) -> Result<Self, Message> {
        let options = DecoderOptions::default().jpeg_set_out_colorspace(space);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(jpeg), options);
        let bytes = decoder.decode().map_err(|error| message!("JPEG: {error:?}"))?;
        let info = decoder.info().ok_or_else(|| message!("JPEG: no header"))?;
        if bytes.len() != usize::from(info.width) * usize::from(info.height) * 3 {
            return Err(message!("JPEG: not three bytes a pixel"));
        }
        Ok(Self { width: info.width, height: info.height, bytes })
    }
}

/// The JPEG of an input.
pub fn prepare(shape: Shape, seed: u64) -> Result<Vec<u8>, Message> {
    let picture = Picture::synthetic(shape.width, shape.height, 24, seed);
    Ok(picture.encode_within(ColorType::Rgb, shape.bytes)?.0)
}

/// Decodes, rotates and encodes; returns the digest of the three files, and the number of their bytes.
pub fn run(jpeg: &[u8], pace: &mut Pace) -> Result<(u64, u64), Message> {
    let picture = Picture::decode(jpeg, ColorSpace::RGB)?;
    pace.at(1, 7);
    let (mut digest, mut bytes) = (Digest::new(), 0);
    for quarters in 1..=3 {
        let rotated = picture.rotated(quarters);
        pace.at(u64::from(quarters) * 2, 7);
        let encoded = rotated.encode(ColorType::Rgb, QUALITY)?;
        pace.at(u64::from(quarters) * 2 + 1, 7);
        digest.bytes(&encoded);
        bytes += encoded.len() as u64;
    }
    Ok((digest.finish(), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean error of a channel.
    fn distance(a: &Picture, b: &Picture) -> f64 {
        assert_eq!((a.width, a.height, a.bytes.len()), (b.width, b.height, b.bytes.len()));
        let sum: u64 = a.bytes.iter().zip(&b.bytes).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / a.bytes.len() as f64
    }

    #[test]
    fn decoded_picture_is_close_to_the_encoded_one() {
        let picture = Picture::synthetic(123, 77, 4, 1);
        for quality in [75, 95] {
            let jpeg = picture.encode(ColorType::Rgb, quality).unwrap();
            let decoded = Picture::decode(&jpeg, ColorSpace::RGB).unwrap();
            assert!(distance(&picture, &decoded) < 3.0, "{quality}: {}", distance(&picture, &decoded));
            assert!(distance(&picture.rotated(2), &decoded) > 10.0);
        }
        assert!(Picture::decode(b"no JPEG", ColorSpace::RGB).is_err());
    }

    #[test]
    fn rotations_and_flips_move_the_right_pixels() {
        let picture = Picture { width: 3, height: 2, bytes: (0..18).collect() };
        let right = picture.rotated(1);
        assert_eq!((right.width, right.height), (2, 3));
        // The top left corner goes to the top right, the bottom left one to the top left.
        assert_eq!((right.pixel(1, 0), right.pixel(0, 0)), (&[0, 1, 2][..], &[9, 10, 11][..]));
        assert_eq!(right.rotated(1), picture.rotated(2));
        assert_eq!(picture.rotated(2).rotated(1), picture.rotated(3));
        assert_eq!(picture.rotated(3).rotated(1), picture);
        assert_eq!(picture.flipped().pixel(0, 1), picture.pixel(2, 1));
        assert_eq!(picture.flipped().flipped(), picture);
    }

    #[test]
    fn inputs_have_about_the_bytes_they_should() {
        let shape = Shape::of_bytes(20_000);
        let jpeg = prepare(shape, 1).unwrap();
        assert!((15_000..=20_000).contains(&jpeg.len()), "{}", jpeg.len());
        assert_eq!(Shape::of_bytes(A.bytes).width, A.width);
    }
}
