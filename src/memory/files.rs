//! The sources of a plan's pages: the chain's layers, then the plan's tiers, then its images.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::memory::Error;
use crate::memory::guest_ram::FileMapping;
use crate::snapshot::{Chain, Image, ImageOrigin, ImageSpec, PAGE_SIZE, PageOrigin, PageSource, RestorePlan, Snapshot};
use crate::sys::lost::MappedFile;
use crate::sys::page_cache::PageCache;
use crate::tiering::cold::{ColdPool, ColdReader};
use crate::tiering::fault::PageReader;
use crate::tiering::tier::{Mappable, Tier};

/// The files and tiers of a plan's pages, by origin.
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
    pub path: &'a Path,
    /// Added to the offset of a source, bytes.
    pub base: u64,
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

    /// The cold pool that serves the bytes of this origin.
    pub fn cold_source(&self, origin: PageOrigin) -> Option<&Arc<ColdPool>> {
        self.cold().filter(|_| matches!(origin, PageOrigin::Layer(_)))
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

    /// The tier, if the origin is one.
    pub fn tier(&self, origin: PageOrigin) -> Option<&Arc<dyn Tier>> {
        let PageOrigin::Tier(index) = origin else { return None };
        self.tiers.get(index)
    }

    /// The image, if the origin is one.
    pub fn image(&self, origin: PageOrigin) -> Option<&Image> {
        let PageOrigin::Image(index) = origin else { return None };
        self.images.get(index).map(AsRef::as_ref)
    }

    /// Compares pages from `source` on with their checksums if the source is an image. Other sources are compared by
    /// [`verify`](super::verify).
    pub fn verify_image(&self, source: PageSource, parts: &[&[u8]]) -> Result<(), Error> {
        let Some(image) = self.image(source.origin) else { return Ok(()) };
        Ok(image.verify(source.offset, parts)?)
    }

    /// The file of an origin and its path, if the origin is a file.
    fn get(&self, origin: PageOrigin) -> Option<(&File, &Path)> {
        match origin {
            // The placeholder of a memory file that a cold pool serves is never read.
            PageOrigin::Layer(_) if self.cold.is_some() => None,
            PageOrigin::Layer(index) => {
                self.chain.layers().get(index).map(|layer| (layer.memory(), layer.memory_path()))
            }
            PageOrigin::Tier(_) => None,
            PageOrigin::Image(index) => self.images.get(index).map(|image| (image.file(), image.path())),
        }
    }

    /// The file that is mapped for an origin.
    pub fn mapping(&self, origin: PageOrigin) -> Result<Mapped<'_>, Error> {
        let Some(tier) = self.tier(origin) else {
            let (file, path) = self.require(origin)?;
            return Ok(Mapped { file, path, base: 0, align: PAGE_SIZE });
        };
        // A validated plan maps no other source.
        let mapping = tier.mapping().ok_or_else(no_such_source)?;
        let Mappable { file, base, align, .. } = mapping;
        Ok(Mapped { file, path: tier.path(), base, align: align.max(PAGE_SIZE) })
    }

    /// The files of `mapped`.
    pub fn mapped_files<'m>(
        &self,
        mapped: impl IntoIterator<Item = &'m FileMapping>,
    ) -> Result<BTreeMap<PageOrigin, MappedFile>, Error> {
        let mut files = BTreeMap::new();
        for FileMapping { origin, .. } in mapped {
            if let Entry::Vacant(entry) = files.entry(*origin) {
                let Mapped { file, path, .. } = self.mapping(*origin)?;
                entry.insert(MappedFile::new(file, path).map_err(Error::os("copy a file descriptor"))?);
            }
        }
        Ok(files)
    }

    /// The paths of all origins.
    pub fn paths(&self) -> BTreeMap<PageOrigin, PathBuf> {
        let cold = self.cold().map(|pool| PathBuf::from(pool.name()));
        let path = |layer: &Snapshot| cold.clone().unwrap_or_else(|| layer.memory_path().to_owned());
        let layers = (0..).map(PageOrigin::Layer).zip(self.chain.layers().iter().map(path));
        let tiers = (0..).map(PageOrigin::Tier).zip(self.tiers.iter().map(|tier| tier.path().to_owned()));
        let images = (0..).map(PageOrigin::Image).zip(self.images.iter().map(|image| image.path().to_owned()));
        layers.chain(tiers).chain(images).collect()
    }

    /// Reads `bytes` from `source` on.
    pub fn read(&self, source: PageSource, bytes: &mut [u8]) -> Result<(), Error> {
        let read = |path: &Path, result: io::Result<()>| {
            result.map_err(|source| Error::File { doing: "read guest memory from", path: path.to_owned(), source })
        };
        if let Some(tier) = self.tier(source.origin) {
            return read(tier.path(), tier.read(source.offset, bytes));
        }
        let (file, path) = self.require(source.origin)?;
        read(path, file.read_exact_at(bytes, source.offset))?;
        self.verify_image(source, &[bytes])
    }

    /// Reads `bytes` (whole pages) from `source` on past the page cache. Returns false if the file system cannot do
    /// that and the page cache was used. Pages of an image are not compared with their checksums here.
    pub fn read_direct(&self, source: PageSource, bytes: &mut [u8]) -> Result<bool, Error> {
        if self.tier(source.origin).is_some() {
            return self.read(source, bytes).map(|()| false);
        }
        let (_, path) = self.require(source.origin)?;
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

    /// The file of an origin and its path; a validated plan names only files here.
    pub fn require(&self, origin: PageOrigin) -> Result<(&File, &Path), Error> {
        self.get(origin).ok_or_else(no_such_source)
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
        if let Some(cold) = self.cold.as_mut().filter(|_| matches!(source.origin, PageOrigin::Layer(_))) {
            return cold.read(source.offset, bytes);
        }
        let (path, result) = match self.tier(source.origin) {
            Some(tier) => (tier.path(), tier.read(source.offset, bytes)),
            None => {
                let (file, path) = self.get(source.origin).ok_or(io::ErrorKind::NotFound)?;
                (path, file.read_exact_at(bytes, source.offset))
            }
        };
        result.map_err(|cause| io::Error::other(Unreadable { path: path.to_owned(), cause }))?;
        let damaged = |error: Error| io::Error::new(io::ErrorKind::InvalidData, error);
        self.verify_image(source, &[bytes]).map_err(damaged)
    }
}
