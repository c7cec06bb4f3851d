//! The sources of a plan's pages: the chain's layers, then the plan's tiers, then its images.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::memory::Error;
use crate::memory::guest_ram::FileMapping;
use crate::snapshot::{Chain, Image, ImageOrigin, ImageSpec, PAGE_SIZE, PageSource, RestorePlan, Snapshot};
use crate::sys::lost::MappedFile;
use crate::sys::page_cache::PageCache;
use crate::tiering::cold::{ColdPool, ColdReader};
use crate::tiering::fault::PageReader;
use crate::tiering::tier::{Mappable, Tier};

/// Sources by the index that plans use.
#[derive(Clone)]
pub struct Files {
    chain: Arc<Chain>,
    tiers: Vec<Arc<dyn Tier>>,
    images: Vec<Arc<Image>>,
    /// Serves the bytes of the layers' memory files, which need not exist then.
    cold: Option<ColdReader>,
}

/// A file to be mapped, and the limits of its mappings.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<'a> {
    pub file: &'a File,
    /// Added to the offset of a source, bytes.
    pub base: u64,
    /// True if the kernel copies written pages; otherwise the file is mapped shared and read-only.
    pub copy_on_write: bool,
    /// Offset, address and length of a mapping are multiples of this, bytes.
    pub align: u64,
}

/// The sources of a restored guest's pages.
#[derive(Clone)]
pub struct Sources {
    pub chain: Arc<Chain>,
    /// The tiers that the plan names, in its order.
    pub tiers: Vec<Arc<dyn Tier>>,
    /// The cold pool with the chain's memory, whose files need not exist then. The plan has been lowered for it
    /// (`lower`).
    pub cold: Option<Arc<ColdPool>>,
}

impl Files {
    /// Opens the sources of `plan`. Images that do not exist yet are made.
    pub fn open(sources: Sources, plan: &RestorePlan) -> Result<Self, Error> {
        let Sources { chain, tiers, cold } = sources;
        let images = plan.images.iter().map(|spec| open_image(&chain, spec)).collect::<Result<_, _>>()?;
        let cold = cold.map(|pool| ColdReader::new(&pool, 0));
        Ok(Files { chain, tiers, images, cold })
    }

    /// The cold pool that serves the chain's memory in place of its files.
    pub fn cold(&self) -> Option<&Arc<ColdPool>> {
        self.cold.as_ref().map(ColdReader::pool)
    }

    /// The cold pool that serves the bytes of this source.
    pub fn cold_source(&self, index: usize) -> Option<&Arc<ColdPool>> {
        self.cold().filter(|_| index < self.chain.layers().len())
    }

    /// Connects to the cold pool, if there is one, so that the first read need not.
    pub fn connect(&mut self) -> Result<(), Error> {
        let Some(cold) = &mut self.cold else { return Ok(()) };
        let path = PathBuf::from(cold.pool().name());
        cold.connect().map_err(|source| Error::File { doing: "connect to the cold pool", path, source })
    }

    /// This thread's reader of the cold pool.
    pub fn cold_reader(&mut self) -> Option<&mut ColdReader> {
        self.cold.as_mut()
    }

    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The tiers. A caller that outlives the restore holds them: they must not change while their bytes are mapped.
    pub fn tiers(&self) -> &[Arc<dyn Tier>] {
        &self.tiers
    }

    /// The index of the plan's first image.
    pub fn first_image(&self) -> usize {
        self.chain.layers().len() + self.tiers.len()
    }

    /// The tier with this index, if the index is a tier's.
    pub fn tier(&self, index: usize) -> Option<&Arc<dyn Tier>> {
        self.tiers.get(index.checked_sub(self.chain.layers().len())?)
    }

    /// The image with this index, if the index is an image's.
    pub fn image(&self, index: usize) -> Option<&Image> {
        self.images.get(index.checked_sub(self.first_image())?).map(AsRef::as_ref)
    }

    /// Compares pages from `source` on with their checksums if the source is an image. Other sources are compared by
    /// [`verify`](super::verify).
    pub fn verify_image(&self, source: PageSource, parts: &[&[u8]]) -> Result<(), Error> {
        let Some(image) = self.image(source.layer) else { return Ok(()) };
        Ok(image.verify(source.offset, parts)?)
    }

    /// The file of a source and its path, if the source is a file.
    fn get(&self, index: usize) -> Option<(&File, &Path)> {
        // The placeholder of a memory file that a cold pool serves is never read.
        if self.cold_source(index).is_some() {
            return None;
        }
        match self.chain.layers().get(index) {
            Some(layer) => Some((layer.memory(), layer.memory_path())),
            None => self.image(index).map(|image| (image.file(), image.path())),
        }
    }

    /// The file that is mapped for a source.
    pub fn mapping(&self, index: usize) -> Result<Mapped<'_>, Error> {
        let Some(tier) = self.tier(index) else {
            let (file, _) = self.require(index)?;
            return Ok(Mapped { file, base: 0, copy_on_write: true, align: PAGE_SIZE });
        };
        // A validated plan maps no other source.
        let mapping = tier.mapping().ok_or_else(no_such_source)?;
        let Mappable { file, base, copy_on_write, align, .. } = mapping;
        Ok(Mapped { file, base, copy_on_write, align: align.max(PAGE_SIZE) })
    }

    /// The files of `mapped` by their numbers; `None` for files that are not mapped.
    pub fn mapped_files(&self, mapped: &[FileMapping]) -> Result<Vec<Option<MappedFile>>, Error> {
        let paths = self.paths();
        let mut files: Vec<Option<MappedFile>> = Vec::new();
        files.resize_with(paths.len(), || None);
        for FileMapping { file: index, .. } in mapped {
            if files[*index].is_none() {
                let file = MappedFile::new(self.mapping(*index)?.file, &paths[*index]);
                files[*index] = Some(file.map_err(Error::os("copy a file descriptor"))?);
            }
        }
        Ok(files)
    }

    /// The paths of all sources, in the order of their index.
    pub fn paths(&self) -> Vec<PathBuf> {
        let cold = self.cold().map(|pool| PathBuf::from(pool.name()));
        let path = |layer: &Snapshot| cold.clone().unwrap_or_else(|| layer.memory_path().to_owned());
        let layers = self.chain.layers().iter().map(path);
        let tiers = self.tiers.iter().map(|tier| tier.path().to_owned());
        layers.chain(tiers).chain(self.images.iter().map(|image| image.path().to_owned())).collect()
    }

    /// Reads `bytes` from `source` on.
    pub fn read(&self, source: PageSource, bytes: &mut [u8]) -> Result<(), Error> {
        let read = |path: &Path, result: io::Result<()>| {
            result.map_err(|source| Error::File { doing: "read guest memory from", path: path.to_owned(), source })
        };
        if let Some(tier) = self.tier(source.layer) {
            return read(tier.path(), tier.read(source.offset, bytes));
        }
        let (file, path) = self.require(source.layer)?;
        read(path, file.read_exact_at(bytes, source.offset))?;
        self.verify_image(source, &[bytes])
    }

    /// Reads `bytes` (whole pages) from `source` on past the page cache. Returns false if the file system cannot do
    /// that and the page cache was used. Pages of an image are not compared with their checksums here.
    pub fn read_direct(&self, source: PageSource, bytes: &mut [u8]) -> Result<bool, Error> {
        if self.tier(source.layer).is_some() {
            return self.read(source, bytes).map(|()| false);
        }
        let (_, path) = self.require(source.layer)?;
        match Files::open_direct(path).and_then(|file| file.read_exact_at(bytes, source.offset)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.read(source, bytes).map(|()| false),
            Err(error) => Err(Error::File { doing: "read directly", path: path.to_owned(), source: error }),
        }
    }

    /// Opens a file to be read past the page cache; EINVAL if its file system cannot.
    pub fn open_direct(path: &Path) -> io::Result<File> {
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
    }

    /// The file of a source and its path; a validated plan names only files here.
    pub fn require(&self, index: usize) -> Result<(&File, &Path), Error> {
        self.get(index).ok_or_else(no_such_source)
    }
}

fn open_image(chain: &Chain, spec: &ImageSpec) -> Result<Arc<Image>, Error> {
    let (image, origin) = Image::open(chain, spec, &PageCache)?;
    if origin == ImageOrigin::MadeAgain {
        let path = image.path().display();
        tracing::warn!(%path, "An image without checksums, of an older tvmm, was made again from verified memory");
    }
    Ok(Arc::new(image))
}

/// A local file or pool whose bytes cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {cause}", path = path.display())]
pub struct Unreadable {
    pub path: PathBuf,
    pub cause: io::Error,
}

fn no_such_source() -> Error {
    Error::Os { doing: "find a source of the restore plan", source: io::Error::from(io::ErrorKind::NotFound) }
}

impl PageReader for Files {
    fn read(&mut self, source: PageSource, bytes: &mut [u8]) -> io::Result<()> {
        if let Some(cold) = self.cold.as_mut().filter(|_| source.layer < self.chain.layers().len()) {
            return cold.read(source.offset, bytes);
        }
        let (path, result) = match self.tier(source.layer) {
            Some(tier) => (tier.path(), tier.read(source.offset, bytes)),
            None => {
                let (file, path) = self.get(source.layer).ok_or(io::ErrorKind::NotFound)?;
                (path, file.read_exact_at(bytes, source.offset))
            }
        };
        result.map_err(|cause| io::Error::other(Unreadable { path: path.to_owned(), cause }))?;
        let damaged = |error: Error| io::Error::new(io::ErrorKind::InvalidData, error);
        self.verify_image(source, &[bytes]).map_err(damaged)
    }
}
