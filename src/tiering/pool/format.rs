//! The bytes of a pool.
//!
//! ```text
//! 0        superblock 0 │ 4096 superblock 1 │ 8192 writer │ 65536 leases (2048 × 128 bytes)
//! 2 MiB    catalogue: blobs, written to free space, named by the superblock
//!          sums: CRC-32C of each page of data, 4 bytes
//!          hashes: the first 16 bytes of BLAKE3 of each page of data
//!          data: pages
//! ```
//!
//! Every part starts and ends at a multiple of 2 MiB, so that page and file offsets of the data agree modulo 2 MiB. Of
//! the two superblocks the valid one with the higher generation counts. A new state is written to the other one after
//! everything it names is durable, so that a torn write leaves the state before. All numbers are little-endian.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::medium::Medium;
use crate::snapshot::{Digest, HUGE_PAGE_SIZE, PAGE_SIZE, PoolId};

/// The version of the format.
pub const VERSION: u32 = 1;
pub const MAGIC: [u8; 8] = *b"TVMMPOOL";
/// Bytes of a superblock's slot.
pub const SLOT: u64 = 4096;
/// Magic, version, CRC-32C of the payload, length of the payload.
const PREFIX: usize = 8 + 4 + 4 + 4;
/// Offset of the writer's record; also the byte that the writer locks.
pub const WRITER: u64 = 2 * SLOT;
/// Offset of the leases; each lease locks the first byte of its slot.
pub const LEASES: u64 = 64 << 10;
pub const LEASE_LEN: u64 = 128;
pub const LEASE_SLOTS: u64 = 2048;
/// Every part is a multiple of this, so that huge pages can map it.
pub const BLOCK: u64 = HUGE_PAGE_SIZE;
pub const BLOCK_PAGES: u64 = BLOCK / PAGE_SIZE;
pub const SUM_LEN: u64 = 4;
pub const HASH_LEN: u64 = 16;

/// A stretch of the medium, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub offset: u64,
    pub len: u64,
}

/// The places of the parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    pub catalogue: Part,
    pub sums: Part,
    pub hashes: Part,
    pub data: Part,
}

impl Geometry {
    /// The smallest medium: header, 4 MiB of catalogue, sums, hashes, and one block of data.
    pub const LEAST: u64 = 6 * BLOCK;

    /// Lays out a medium of `len` bytes.
    pub fn of(len: u64, path: &Path) -> Result<Geometry, Error> {
        let len = len / BLOCK * BLOCK;
        if len < Geometry::LEAST {
            return Err(Error::TooSmall { path: path.to_path_buf(), have: len, need: Geometry::LEAST });
        }
        let catalogue = (len / 128).next_multiple_of(BLOCK).max(2 * BLOCK);
        // Sums and hashes for the most pages there could be: slightly more than there are.
        let pages = (len - BLOCK - catalogue) / PAGE_SIZE;
        let sums = (pages * SUM_LEN).next_multiple_of(BLOCK);
        let hashes = (pages * HASH_LEN).next_multiple_of(BLOCK);
        let mut offset = BLOCK;
        let mut part = |len| {
            let part = Part { offset, len };
            offset += len;
            part
        };
        let catalogue = part(catalogue);
        let sums = part(sums);
        let hashes = part(hashes);
        Ok(Geometry { catalogue, sums, hashes, data: Part { offset, len: len - offset } })
    }

    /// Pages of data.
    pub fn pages(&self) -> u64 {
        self.data.len / PAGE_SIZE
    }

    /// The offset of a page of data on the medium, bytes.
    pub fn page(&self, page: u64) -> u64 {
        self.data.offset + page * PAGE_SIZE
    }

    /// True if [`Geometry::of`] gives the same for a medium that is no longer than `len`.
    fn is_sound(&self, len: u64) -> bool {
        let end = self.data.offset.checked_add(self.data.len);
        end.is_some_and(|end| end <= len && Geometry::of(end, Path::new("")).is_ok_and(|own| own == *self))
    }
}

/// A blob of the catalogue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Offset on the medium, bytes.
    pub offset: u64,
    pub len: u64,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
}

/// The root of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    pub id: PoolId,
    /// Counts states: each is one more than the one before.
    pub generation: u64,
    /// Time of making the pool, seconds since 1970.
    pub created: u64,
    pub geometry: Geometry,
    pub directory: Blob,
}

impl Superblock {
    /// The bytes of its slot.
    pub fn encode(&self) -> Vec<u8> {
        let payload = postcard::to_stdvec(self).unwrap_or_default();
        let mut slot = Vec::with_capacity(SLOT as usize);
        slot.extend(MAGIC);
        slot.extend(VERSION.to_le_bytes());
        slot.extend(crc32c::crc32c(&payload).to_le_bytes());
        slot.extend((payload.len() as u32).to_le_bytes());
        slot.extend(payload);
        slot.resize(SLOT as usize, 0);
        slot
    }

    /// Reads a slot's bytes. `Ok(None)`: not whole.
    fn decode(slot: &[u8], path: &Path) -> Result<Option<Superblock>, Error> {
        if slot[..8] != MAGIC {
            return Ok(None);
        }
        let number = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
        let version = number(8);
        let sum = number(12);
        let len = number(16) as usize;
        if version > VERSION {
            return Err(Error::Newer { path: path.to_path_buf(), version, known: VERSION });
        }
        let Some(payload) = slot.get(PREFIX..PREFIX.saturating_add(len)) else { return Ok(None) };
        if version != VERSION || crc32c::crc32c(payload) != sum {
            return Ok(None);
        }
        Ok(postcard::from_bytes(payload).ok())
    }
}

/// The valid superblocks, newest first, with the number of their slot.
///
/// # Errors
/// [`Error::NotAPool`]; [`Error::Newer`]; [`Error::Damaged`] if there were superblocks and none is valid.
pub fn superblocks(medium: &dyn Medium) -> Result<Vec<(u64, Superblock)>, Error> {
    let path = medium.path();
    if medium.size() < Geometry::LEAST {
        return Err(Error::NotAPool { path: path.to_path_buf() });
    }
    let mut bytes = vec![0; 2 * SLOT as usize];
    medium.read(0, &mut bytes).map_err(Error::io("read the superblock of", path))?;
    let mut found = Vec::new();
    for (index, slot) in bytes.chunks_exact(SLOT as usize).enumerate() {
        found.extend(Superblock::decode(slot, path)?.map(|superblock| (index as u64, superblock)));
    }
    if found.is_empty() {
        let is_ours = bytes.chunks_exact(SLOT as usize).any(|slot| slot[..8] == MAGIC);
        let damaged = || Error::damaged(path, "neither of its superblocks is whole");
        return Err(if is_ours { damaged() } else { Error::NotAPool { path: path.to_path_buf() } });
    }
    if let Some((_, bad)) = found.iter().find(|(_, found)| !found.geometry.is_sound(medium.size())) {
        let have = medium.size();
        let end = bad.geometry.data.offset.saturating_add(bad.geometry.data.len);
        return Err(Error::damaged(path, format!("it was made with {end} bytes, of which {have} are there")));
    }
    found.sort_by_key(|(_, superblock)| std::cmp::Reverse(superblock.generation));
    if found.iter().any(|(_, other)| other.id != found[0].1.id) {
        found.truncate(1);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_has_room_for_every_page_and_blocks_stay_aligned() {
        for mib in [12, 14, 64, 512, 4096, 1 << 20] {
            let geometry = Geometry::of((mib << 20) + 4096, Path::new("p")).unwrap();
            let parts = [geometry.catalogue, geometry.sums, geometry.hashes, geometry.data];
            let mut at = BLOCK;
            for part in parts {
                assert_eq!((part.offset, part.len % BLOCK), (at, 0), "{mib} MiB");
                assert!(part.len > 0);
                at += part.len;
            }
            assert_eq!(at, mib << 20);
            assert!(geometry.sums.len >= geometry.pages() * SUM_LEN);
            assert!(geometry.hashes.len >= geometry.pages() * HASH_LEN);
            assert!(geometry.is_sound(mib << 20) && !geometry.is_sound((mib << 20) - 1));
        }
        assert!(matches!(Geometry::of(11 << 20, Path::new("p")), Err(Error::TooSmall { .. })));
    }
}
