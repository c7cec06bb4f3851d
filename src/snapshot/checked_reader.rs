//! Reading single pages of a layer that are compared with their checksums first.

use super::memory_check::{held_span, place_in};
use super::page_map::{CHUNK_PAGES, PageMap, chunk_of};
use super::{Error, Extent, PAGE_SIZE, Result, Snapshot};

/// Reads held pages of a layer. Each chunk is compared with its checksum before any of it is handed out.
pub(crate) struct CheckedReader<'a> {
    layer: &'a Snapshot,
    map: &'a PageMap,
    buffer: Vec<u8>,
    /// The chunk that `buffer` has.
    loaded: Option<u64>,
}

impl<'a> CheckedReader<'a> {
    pub(crate) fn new(layer: &'a Snapshot) -> Result<Self> {
        let buffer = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
        Ok(CheckedReader { layer, map: layer.page_map()?, buffer, loaded: None })
    }

    /// Fills `bytes` with the pages of `extent`, which the layer holds.
    ///
    /// # Errors
    /// [`Error::BadMemory`] for a chunk that differs from the written one.
    pub(crate) fn read(&mut self, extent: Extent, bytes: &mut [u8]) -> Result<()> {
        let mut rest = bytes;
        for part in extent.chunks(CHUNK_PAGES) {
            let chunk = chunk_of(part.first);
            if self.loaded != Some(chunk) {
                self.loaded = None;
                let (_, computed) = self.layer.memory_file().load_chunk(self.map, chunk, &mut self.buffer)?;
                if self.map.checksum(chunk) != Some(computed) {
                    let object = self.layer.object().to_string();
                    let first = held_span(self.map, chunk);
                    return Err(Error::BadMemory { object, bad: 1, first });
                }
                self.loaded = Some(chunk);
            }
            let (to, behind) = rest.split_at_mut(part.bytes() as usize);
            to.copy_from_slice(&self.buffer[place_in(chunk, part)]);
            rest = behind;
        }
        Ok(())
    }
}
