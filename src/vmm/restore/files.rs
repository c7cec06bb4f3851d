//! The files a plan takes pages from: the chain's layers, then the plan's images.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::snapshot::{Chain, PageSource, RestorePlan, open_image};
use crate::tiering::fault::PageReader;
use crate::vmm::error::Error;
use crate::vmm::sys::page_cache::PageCache;

/// Files by the index that plans use.
#[derive(Clone)]
pub struct Files {
    chain: Arc<Chain>,
    images: Vec<Arc<(File, PathBuf)>>,
}

impl Files {
    /// Opens what `plan` needs; images that were never made are made now.
    pub fn open(chain: Arc<Chain>, plan: &RestorePlan) -> Result<Self, Error> {
        let open = |spec| Ok::<_, Error>(Arc::new(open_image(&chain, spec, &PageCache)?));
        let images = plan.images.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Files { chain, images })
    }

    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The file of a source, and its path.
    pub fn get(&self, index: usize) -> Option<(&File, &Path)> {
        let layers = self.chain.layers();
        match layers.get(index) {
            Some(layer) => Some((layer.memory(), layer.memory_path())),
            None => self.images.get(index - layers.len()).map(|image| (&image.0, image.1.as_path())),
        }
    }

    /// The paths of all files, in the order of their index.
    pub fn paths(&self) -> Vec<PathBuf> {
        let layers = self.chain.layers().iter().map(|layer| layer.memory_path().to_owned());
        layers.chain(self.images.iter().map(|image| image.1.clone())).collect()
    }

    /// Reads `bytes` from `source` on.
    pub fn read(&self, source: PageSource, bytes: &mut [u8]) -> Result<(), Error> {
        let (file, path) = self.require(source.layer)?;
        let failed = |source| Error::File { doing: "read guest memory from", path: path.to_owned(), source };
        file.read_exact_at(bytes, source.offset).map_err(failed)
    }

    /// Reads `bytes` (whole pages) from `source` on past the page cache. File systems that cannot do that are read through
    /// it; returns whether it was past it.
    pub fn read_direct(&self, source: PageSource, bytes: &mut [u8]) -> Result<bool, Error> {
        let (_, path) = self.require(source.layer)?;
        match Files::open_direct(path).and_then(|file| file.read_exact_at(bytes, source.offset)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.read(source, bytes).map(|()| false),
            Err(error) => Err(Error::File { doing: "read directly", path: path.to_owned(), source: error }),
        }
    }

    /// Opens a file to be read past the page cache; EINVAL where its file system cannot.
    pub fn open_direct(path: &Path) -> io::Result<File> {
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
    }

    /// As [`get`](Self::get); a validated plan names no other files.
    pub fn require(&self, index: usize) -> Result<(&File, &Path), Error> {
        self.get(index).ok_or_else(|| Error::Os {
            doing: "find a file of the restore plan",
            source: io::Error::from(io::ErrorKind::NotFound),
        })
    }
}

impl PageReader for Files {
    fn read(&mut self, source: PageSource, bytes: &mut [u8]) -> io::Result<()> {
        let (file, _) = self.get(source.layer).ok_or(io::ErrorKind::NotFound)?;
        file.read_exact_at(bytes, source.offset)
    }
}
