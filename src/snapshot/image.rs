//! Images: files derived from a snapshot, with the pages of some extents packed one after the other (working-set
//! files). They are caches: named after what they hold, made when they are needed, free to be deleted.
//!
//! An image has a checksum for each of its pages (`docs/snapshot-format.md`). It is made of pages that were compared
//! with the snapshot's checksums, and every reader compares what it took from the image with the image's.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::Advice;

use super::checked_reader::CheckedReader;
use super::container::container_len_of;
use super::partial::{PartialFile, sweep_own};
use super::{
    Chain, Container, Digest, Error, Extent, HUGE_PAGE_SIZE, ImageSpec, LoadHuge, PAGE_SIZE, ResolvedRun, Result,
    Section, SectionKind, SnapshotId, files, lru, write_container,
};

/// Pages copied at once.
const PIECE_PAGES: u64 = 256;
/// The version of the two sections of an image's container.
const VERSION: u32 = 1;
/// The last bytes of an image: the offset of its container, and these.
const MAGIC: &[u8; 8] = b"TVMMIMG2";
const TAIL_LEN: usize = 16;
/// The payload of the section that identifies an image: a snapshot, a digest, a number of pages.
const HEAD_LEN: usize = 32 + 32 + 8;

/// The way an image came to be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageOrigin {
    /// It existed.
    Found,
    /// It was made.
    Made,
    /// A file without checksums existed, made by an older tvmm. The image was made again.
    MadeAgain,
}

/// An image that is open, with the checksums of its pages.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    /// Its pages in file order.
    extents: Vec<Extent>,
    snapshot: SnapshotId,
    digest: Digest,
    /// CRC32C of each page, in file order; read when they are first needed.
    sums: OnceLock<Vec<u32>>,
}

impl Image {
    /// The image of `spec` over the memory that `chain` describes: opened if it was made before, made otherwise.
    ///
    /// Its checksums are requested without waiting: the device reads them while the restore goes on.
    ///
    /// # Errors
    /// [`Error::Image`] for a file of another length; [`Error::BadMemory`] if it is to be made of damaged pages;
    /// [`Error::Io`].
    pub fn open(chain: &Chain, spec: &ImageSpec, cache: &dyn LoadHuge) -> Result<(Image, ImageOrigin)> {
        let mut opened = Image::open_once(chain, spec, cache);
        for _ in 1..OPEN_ATTEMPTS {
            // Another process may just have made room in the folder.
            let is_gone =
                |error: &Error| matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
            if !opened.as_ref().is_err_and(is_gone) {
                break;
            }
            opened = Image::open_once(chain, spec, cache);
        }
        opened
    }

    fn open_once(chain: &Chain, spec: &ImageSpec, cache: &dyn LoadHuge) -> Result<(Image, ImageOrigin)> {
        let id = chain.tip().id();
        let digest = digest_of(id, spec);
        let mut path = chain.derived_file(&file_name(digest));
        let mut origin = ImageOrigin::Found;
        if !path.exists() {
            origin = ImageOrigin::Made;
        } else if has_no_checksums(&path, spec)? {
            origin = ImageOrigin::MadeAgain;
        }
        if origin != ImageOrigin::Found {
            let dir = chain.derived_dir();
            path = dir.join(file_name(digest));
            make(chain, spec, &dir, &path, cache)?;
        }
        let (file, len) = files::open_regular(&path)?;
        lru::note_use(&file);
        let data_len = spec.file_len();
        let expected = data_len.saturating_add(expected_len(data_len / PAGE_SIZE)).saturating_add(TAIL_LEN as u64);
        if len != expected {
            let problem = format!("it is {len} bytes long, not {expected}");
            let source = Box::new(Error::malformed(&path.display().to_string(), problem));
            return Err(Error::Image { path, source });
        }
        // A hint; without it the checksums are read when they are needed.
        let _ = rustix::fs::fadvise(&file, data_len, NonZeroU64::new(len - data_len), Advice::WillNeed);
        let extents = spec.extents.clone();
        let sums = OnceLock::new();
        Ok((Image { file, path, extents, snapshot: id, digest, sums }, origin))
    }

    fn sums(&self) -> Result<&[u32]> {
        if let Some(sums) = self.sums.get() {
            return Ok(sums);
        }
        let path = &self.path;
        let len = self.file.metadata().map_err(Error::io("stat", path))?.len();
        let sums = Trailer::read(&self.file, path, len)
            .and_then(|trailer| trailer.into_sums_of(path, self.snapshot, self.digest))
            .map_err(|source| Error::Image { path: path.clone(), source: Box::new(source) })?;
        Ok(self.sums.get_or_init(|| sums))
    }

    /// The file; its pages start at offset 0.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compares pages that were read or mapped from `offset` on, one part after the other, with their checksums.
    ///
    /// # Errors
    /// [`Error::BadImagePage`] with the first page that differs; [`Error::Image`] if the checksums are damaged.
    pub fn verify(&self, offset: u64, parts: &[&[u8]]) -> Result<()> {
        let first = (offset / PAGE_SIZE) as usize;
        let pages = parts.iter().flat_map(|part| part.chunks_exact(PAGE_SIZE as usize));
        match first_bad(self.sums()?.get(first..).unwrap_or_default(), pages) {
            None => Ok(()),
            Some(index) => Err(bad_page(&self.path, first + index, &self.extents)),
        }
    }
}

/// The first page that does not have the checksum in its place.
fn first_bad<'a>(sums: &[u32], pages: impl Iterator<Item = &'a [u8]>) -> Option<usize> {
    let mut sums = sums.iter();
    pages.enumerate().find(|(_, page)| sums.next() != Some(&crc32c::crc32c(page))).map(|(index, _)| index)
}

/// `extents`: the image's pages, empty if they are not known.
fn bad_page(path: &Path, index: usize, extents: &[Extent]) -> Error {
    let mut left = index as u64;
    let holds = |extent: &&Extent| {
        let is_in = left < extent.pages;
        left -= if is_in { 0 } else { extent.pages };
        is_in
    };
    let extent = extents.iter().find(holds).copied();
    let gpa = extent.map(|extent| extent.gpa() + left * PAGE_SIZE);
    Error::BadImagePage { path: path.to_path_buf(), offset: index as u64 * PAGE_SIZE, gpa }
}

/// True if a file is an image as tvmm wrote them before images had checksums: pages and nothing else.
fn has_no_checksums(path: &Path, spec: &ImageSpec) -> Result<bool> {
    let (_, len) = files::open_regular(path)?;
    Ok(len == spec.file_len())
}

/// The end of an image: everything behind its pages.
struct Trailer {
    snapshot: SnapshotId,
    /// The digest of snapshot and extents. The image is named after it.
    digest: Digest,
    sums: Vec<u32>,
}

impl Trailer {
    /// Reads the trailer of a file of `len` bytes.
    fn read(file: &File, path: &Path, len: u64) -> Result<Trailer> {
        let object = path.display().to_string();
        let malformed = |problem: &str| Error::malformed(&object, problem);
        let tail_at = len.checked_sub(TAIL_LEN as u64).ok_or_else(|| malformed("it is too short for an image"))?;
        let mut tail = [0; TAIL_LEN];
        file.read_exact_at(&mut tail, tail_at).map_err(Error::io("read", path))?;
        let (at, magic) = tail.split_at(8);
        if magic != MAGIC {
            return Err(malformed("it does not end as an image does"));
        }
        let at = u64::from_le_bytes([at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]]);
        // Checked, so that a file is never taken for one with more checksums than it has pages.
        let expected = expected_len(at / PAGE_SIZE);
        if at % PAGE_SIZE != 0 || at.checked_add(expected) != Some(tail_at) {
            return Err(malformed(&format!("{at} pages' bytes do not fit its length of {len}")));
        }
        let mut bytes = vec![0; expected as usize];
        file.read_exact_at(&mut bytes, at).map_err(Error::io("read", path))?;
        let container = Container::parse_named(object.clone(), bytes)?;
        let head = section(&container, SectionKind::Image)?;
        let sums = section(&container, SectionKind::ImageSums)?;
        let (Some((snapshot, rest)), (words, [])) = (head.split_first_chunk::<32>(), sums.as_chunks::<4>()) else {
            return Err(malformed("its sections have wrong lengths"));
        };
        let Some((digest, pages)) = rest.split_first_chunk::<32>() else {
            return Err(malformed("its sections have wrong lengths"));
        };
        if pages != (at / PAGE_SIZE).to_le_bytes() || words.len() as u64 != at / PAGE_SIZE {
            return Err(malformed("it has another number of pages than it says"));
        }
        let sums = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        Ok(Trailer { snapshot: SnapshotId(*snapshot), digest: Digest(*digest), sums })
    }

    /// The checksums, if this is the trailer of the image that is expected.
    fn into_sums_of(self, path: &Path, id: SnapshotId, digest: Digest) -> Result<Vec<u32>> {
        // The digest covers the extents, and so the number of pages.
        if self.snapshot == id && self.digest == digest {
            return Ok(self.sums);
        }
        Err(Error::malformed(&path.display().to_string(), "it holds other pages than its name says"))
    }

    /// The bytes that follow the pages.
    fn to_bytes(&self) -> Vec<u8> {
        let pages = self.sums.len() as u64;
        let head = [&self.snapshot.0[..], &self.digest.0, &pages.to_le_bytes()].concat();
        let sums = self.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        let section = |kind, payload| Section { kind, instance: 0, version: VERSION, payload };
        let mut bytes = write_container(&[section(SectionKind::Image, head), section(SectionKind::ImageSums, sums)]);
        bytes.extend((pages * PAGE_SIZE).to_le_bytes());
        bytes.extend(MAGIC);
        bytes
    }
}

/// The length of the container of an image with this many pages.
fn expected_len(pages: u64) -> u64 {
    container_len_of([HEAD_LEN as u64, pages.saturating_mul(4)].into_iter())
}

fn section(container: &Container, kind: SectionKind) -> Result<&[u8]> {
    let info = container.info(kind, 0)?;
    if info.version != VERSION {
        let problem = format!("section {} has version {}, this build reads {VERSION}", kind.number(), info.version);
        return Err(Error::malformed(container.object(), problem));
    }
    container.payload(info)
}

fn digest_of(snapshot: SnapshotId, spec: &ImageSpec) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&snapshot.0);
    for extent in &spec.extents {
        hasher.update(&extent.first.0.to_le_bytes());
        hasher.update(&extent.pages.to_le_bytes());
    }
    Digest(*hasher.finalize().as_bytes())
}

/// The file name of an image of `spec` over the memory of `snapshot`.
pub fn image_name(snapshot: SnapshotId, spec: &ImageSpec) -> String {
    file_name(digest_of(snapshot, spec))
}

/// Limit of attempts to make an image that other processes remove before it is open.
const OPEN_ATTEMPTS: usize = 8;

/// The least that a folder of plans and images may hold, in bytes.
const DERIVED_LIMIT_MIN: u64 = 64 << 20;

/// Removes the plans and images of `chain` that were used longest ago, until the folder holds at most twice the bytes
/// that the chain does (but no less than 64 MiB). `made`, the one just made, stays.
///
/// # Errors
/// [`Error::Io`].
pub fn bound_derived(chain: &Chain, made: &Path) -> Result<()> {
    let held: u64 = chain.layers().iter().map(|layer| layer.manifest().pages_held * PAGE_SIZE).sum();
    let limit = (2 * held).max(DERIVED_LIMIT_MIN);
    let dir = chain.derived_dir();
    let is_derived = |name: &OsStr| Path::new(name).extension().is_some_and(|end| end == "image" || end == "plan");
    lru::shrink(&dir, limit, made, is_derived).map(drop).map_err(Error::io("make room in", &dir))
}

fn file_name(digest: Digest) -> String {
    format!("{}.image", &digest.to_string()[..32])
}

/// The state of an image file, all of which was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Every page has its checksum.
    Intact { pages: u64 },
    /// It is of another snapshot, and no restore uses it.
    OfOther,
    /// It was made by a tvmm that gave images no checksums. No restore uses it as it is.
    WithoutChecksums,
}

/// Reads all of the image file at `path`, which lies beside the snapshot `id`. `specs`: images that it may be, so that
/// an error can name the page.
///
/// # Errors
/// [`Error::BadImagePage`], [`Error::Image`] for damage; [`Error::Io`].
pub fn check_image(path: &Path, id: SnapshotId, specs: &[ImageSpec]) -> Result<ImageState> {
    let is_named = |spec: &&ImageSpec| path.file_name().is_some_and(|name| name == &*file_name(digest_of(id, spec)));
    let spec = specs.iter().find(is_named);
    let (file, len) = files::open_regular(path)?;
    if spec.is_some_and(|spec| spec.file_len() == len) {
        return Ok(ImageState::WithoutChecksums);
    }
    let damaged = |source| Error::Image { path: path.to_path_buf(), source: Box::new(source) };
    let trailer = Trailer::read(&file, path, len).map_err(damaged)?;
    if trailer.snapshot != id {
        return Ok(ImageState::OfOther);
    }
    if path.file_name().is_none_or(|name| name != &*file_name(trailer.digest)) {
        return Err(damaged(Error::malformed(&path.display().to_string(), "it holds other pages than its name says")));
    }
    let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    for (index, sums) in trailer.sums.chunks(PIECE_PAGES as usize).enumerate() {
        let bytes = &mut buffer[..sums.len() * PAGE_SIZE as usize];
        let first = index * PIECE_PAGES as usize;
        file.read_exact_at(bytes, first as u64 * PAGE_SIZE).map_err(Error::io("read", path))?;
        if let Some(bad) = first_bad(sums, bytes.chunks_exact(PAGE_SIZE as usize)) {
            let extents = spec.map(|spec| spec.extents.as_slice()).unwrap_or_default();
            return Err(bad_page(path, first + bad, extents));
        }
    }
    Ok(ImageState::Intact { pages: trailer.sums.len() as u64 })
}

/// Writes the image beside its name, makes it durable, moves it into place, and brings it into the page cache in large
/// folios, as sealed memory is.
fn make(chain: &Chain, spec: &ImageSpec, dir: &Path, path: &Path, cache: &dyn LoadHuge) -> Result<()> {
    files::create_private_dir(dir)
        .map_err(Error::io("make working-set images (--plan-dir names another place for them) in", dir))?;
    sweep_own(dir);
    let partial = PartialFile::create(dir)?;
    write(chain, spec, &partial)?;
    let file = partial.file().try_clone().map_err(Error::io("open", path))?;
    partial.publish_durably(path)?;
    bound_derived(chain, path)?;
    files::evict(&file, path)?;
    let huge = spec.file_len() / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
    if huge > 0 {
        cache.load_huge(&file, 0, huge).map_err(Error::io("read back", path))?;
    }
    Ok(())
}

fn write(chain: &Chain, spec: &ImageSpec, partial: &PartialFile) -> Result<()> {
    let runs = chain.resolve()?;
    let mut file = partial.file();
    let mut layers = chain.layers().iter().map(CheckedReader::new).collect::<Result<Vec<_>>>()?;
    let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    let id = chain.tip().id();
    let mut trailer = Trailer { snapshot: id, digest: digest_of(id, spec), sums: Vec::new() };
    for extent in &spec.extents {
        let first = runs.partition_point(|run| run.extent.end() <= extent.first);
        for run in runs[first..].iter().take_while(|run| run.extent.first < extent.end()) {
            let Some(part) = run.extent.intersection(extent) else { continue };
            for piece in part.chunks(PIECE_PAGES) {
                let bytes = &mut buffer[..piece.bytes() as usize];
                read(&mut layers, run, piece, bytes)?;
                trailer.sums.extend(bytes.chunks_exact(PAGE_SIZE as usize).map(crc32c::crc32c));
                file.write_all(bytes).map_err(Error::io("write", partial.path()))?;
            }
        }
    }
    file.write_all(&trailer.to_bytes()).map_err(Error::io("write", partial.path()))
}

fn read(layers: &mut [CheckedReader], run: &ResolvedRun, piece: Extent, bytes: &mut [u8]) -> Result<()> {
    match run.content.layer() {
        Some(layer) => layers[layer].read(piece, bytes),
        // A page of a chain that no layer has is zero.
        None => {
            bytes.fill(0);
            Ok(())
        }
    }
}
