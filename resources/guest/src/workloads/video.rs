//! `ffmpeg`: decode a film, exchange left and right, encode it again, as FaaSnap's `ffmpeg` (`hflip`). The codec is
//! Motion JPEG with 4:2:0 chroma: every frame by itself.

use alloc::vec::Vec;

use jpeg_encoder::ColorType;
use zune_core::colorspace::ColorSpace;

use super::image::Picture;
use super::runtime::Pace;
use crate::args::Message;
use crate::digest::{Digest, mix2};
use crate::message;

pub const WIDTH: u16 = 1080;
pub const HEIGHT: u16 = 460;
pub const FRAMES: u64 = 48;
/// Bytes of FaaSnap's inputs, which code the differences between frames. Without that the same film takes [`TIMES`] as
/// many.
pub const BYTES_A: u64 = 345_454;
pub const BYTES_B: u64 = 389_930;
pub const TIMES: u64 = 3;

/// Frames of a film that had `bytes` bytes in FaaSnap's codec and has as many bytes per frame as input A.
pub fn frames_of(bytes: u64) -> u64 {
    (bytes * FRAMES / BYTES_A).max(1)
}

/// A film of `frames` frames in about `bytes` bytes: its quality, then each frame's length and JPEG. The picture moves
/// sideways.
pub fn prepare(frames: u64, bytes: u64, seed: u64) -> Result<Vec<u8>, Message> {
    let scene = Picture::synthetic(WIDTH, HEIGHT, 6, seed);
    let (_, quality) = scene.encode_within(ColorType::Ycbcr, bytes / frames)?;
    let mut film = Vec::from([quality]);
    for frame in 0..frames {
        append(&mut film, &scene.shifted(frame * 7, mix2(seed, frame)).encode(ColorType::Ycbcr, quality)?);
    }
    Ok(film)
}

impl Picture {
    /// The picture moved left by `pixels`, its left edge comes in on the right; with a block of another brightness.
    fn shifted(&self, pixels: u64, spot: u64) -> Self {
        let row_len = usize::from(self.width) * 3;
        let shift = (pixels as usize * 3) % row_len;
        let mut bytes: Vec<u8> = Vec::with_capacity(self.bytes.len());
        for row in self.bytes.chunks_exact(row_len) {
            bytes.extend(&row[shift..]);
            bytes.extend(&row[..shift]);
        }
        let (left, top) = (spot as usize % (row_len / 3 - 64), (spot >> 32) as usize % (usize::from(self.height) - 64));
        for row in bytes.chunks_exact_mut(row_len).skip(top).take(64) {
            row[left * 3..(left + 64) * 3].iter_mut().step_by(3).for_each(|luma| *luma = luma.wrapping_add(40));
        }
        Self { bytes, ..*self }
    }
}

fn append(film: &mut Vec<u8>, frame: &[u8]) {
    film.extend((frame.len() as u32).to_le_bytes());
    film.extend(frame);
}

/// The frames of a film.
fn split(mut film: &[u8]) -> Result<Vec<&[u8]>, Message> {
    let mut frames = Vec::new();
    while let Some((len, rest)) = film.split_first_chunk::<4>() {
        let (frame, rest) =
            rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(|| message!("film is cut short"))?;
        frames.push(frame);
        film = rest;
    }
    Ok(frames)
}

/// Decodes, flips and encodes every frame; the new film.
pub fn flip(film: &[u8], pace: &mut Pace) -> Result<Vec<u8>, Message> {
    let (&quality, frames) = film.split_first().ok_or_else(|| message!("film is empty"))?;
    let frames = split(frames)?;
    let mut out = Vec::from([quality]);
    for (index, frame) in frames.iter().enumerate() {
        let picture = Picture::decode(frame, ColorSpace::YCbCr)?;
        append(&mut out, &picture.flipped().encode(ColorType::Ycbcr, quality)?);
        pace.at(index as u64 + 1, frames.len() as u64);
    }
    Ok(out)
}

/// Flips the film; the digest of the new one, and the bytes it has.
pub fn run(film: &[u8], pace: &mut Pace) -> Result<(u64, u64), Message> {
    let out = flip(film, pace)?;
    let mut digest = Digest::new();
    digest.bytes(&out);
    Ok((digest.finish(), out.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::runtime::Touches;

    #[test]
    fn film_flipped_twice_is_close_to_the_film() {
        let film = prepare(2, 40_000, 1).unwrap();
        let mut pace = Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0);
        let once = flip(&film, &mut pace).unwrap();
        let twice = flip(&once, &mut pace).unwrap();
        let decode =
            |film: &[u8], frame: usize| Picture::decode(split(&film[1..]).unwrap()[frame], ColorSpace::YCbCr).unwrap();
        for frame in 0..2 {
            let (before, after) = (decode(&film, frame), decode(&twice, frame));
            let sum: u64 = before.bytes.iter().zip(&after.bytes).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            assert!((sum as f64) / (before.bytes.len() as f64) < 2.0, "{sum}");
            let flipped = decode(&once, frame).flipped();
            let sum: u64 = before.bytes.iter().zip(&flipped.bytes).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            assert!((sum as f64) / (before.bytes.len() as f64) < 2.0, "{sum}");
        }
        assert_ne!(decode(&film, 0), decode(&film, 1));
    }

    #[test]
    fn broken_films_are_refused() {
        let mut pace = Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0);
        for film in [&b""[..], &[50, 9, 0, 0, 0, 1], &[50, 1, 0, 0, 0, 1]] {
            assert!(flip(film, &mut pace).is_err());
        }
    }
}
