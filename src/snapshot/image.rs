//! Images: files derived from a snapshot, with the pages of some extents packed one after the other (working-set
//! files). They are caches: named after what they hold, made when they are needed, free to be deleted.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::manifest::canonical;
use super::{Chain, Content, Error, ImageSpec, LoadHuge, Location, PAGE_SIZE, ResolvedRun, Result, files};

/// Pages copied at once.
const PIECE_PAGES: u64 = 256;

/// The folder that caches what was derived from the snapshot at `location`.
pub fn derived_dir(location: &Location) -> PathBuf {
    match location {
        Location::Dir(dir) => dir.join("plan"),
        Location::Files { snapshot, .. } => {
            let mut name = canonical(snapshot).into_os_string();
            name.push(".plan");
            PathBuf::from(name)
        }
    }
}

/// The image of `spec` over the memory that `chain` describes: opened if it was made before, made otherwise.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] if a file of that name has another length.
pub fn open_image(chain: &Chain, spec: &ImageSpec, cache: &dyn LoadHuge) -> Result<(File, PathBuf)> {
    let path = chain.derived_file(&format!("{}.image", name_of(chain, spec)));
    let dir = files::parent_dir(&path);
    if !path.exists() {
        make(chain, spec, &dir, &path, cache)?;
    }
    let file = File::open(&path).map_err(Error::io("open", &path))?;
    let len = file.metadata().map_err(Error::io("inspect", &path))?.len();
    if len != spec.file_len() {
        let problem =
            format!("it is {len} bytes long, its plan says {}; delete it to have it made again", spec.file_len());
        return Err(Error::malformed(&path.display().to_string(), problem));
    }
    Ok((file, path))
}

fn name_of(chain: &Chain, spec: &ImageSpec) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&chain.tip().id().0);
    for extent in &spec.extents {
        hasher.update(&extent.first.0.to_le_bytes());
        hasher.update(&extent.pages.to_le_bytes());
    }
    hasher.finalize().to_hex()[..32].to_string()
}

/// Writes the image beside its name, makes it durable, moves it into place, and brings it into the page cache in large
/// folios, as sealed memory is.
fn make(chain: &Chain, spec: &ImageSpec, dir: &Path, path: &Path, cache: &dyn LoadHuge) -> Result<()> {
    files::create_private_dir(dir)
        .map_err(Error::io("make working-set images (--plan-dir names another place for them) in", dir))?;
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let file = write(chain, spec, &partial).inspect_err(|_| {
        // What could not be finished is of no use to anybody.
        let _ = fs::remove_file(&partial);
    })?;
    fs::rename(&partial, path).map_err(Error::io("rename a finished file to", path))?;
    files::sync_dir(dir)?;
    files::evict(&file, path)?;
    let huge = spec.file_len() / HUGE * HUGE;
    if huge > 0 {
        cache.load_huge(&file, 0, huge).map_err(Error::io("read back", path))?;
    }
    Ok(())
}

const HUGE: u64 = 2 << 20;

fn write(chain: &Chain, spec: &ImageSpec, path: &Path) -> Result<File> {
    let runs = chain.resolve()?;
    // An abandoned one of an earlier process with the same id.
    let _ = fs::remove_file(path);
    let mut file = files::create_new(path)?;
    let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    for extent in &spec.extents {
        let first = runs.partition_point(|run| run.extent.end() <= extent.first);
        for run in runs[first..].iter().take_while(|run| run.extent.first < extent.end()) {
            let Some(part) = run.extent.intersection(extent) else { continue };
            for piece in part.chunks(PIECE_PAGES) {
                let bytes = &mut buffer[..piece.bytes() as usize];
                read(chain, run, piece, bytes)?;
                file.write_all(bytes).map_err(Error::io("write", path))?;
            }
        }
    }
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(file)
}

fn read(chain: &Chain, run: &ResolvedRun, piece: super::Extent, bytes: &mut [u8]) -> Result<()> {
    match run.content {
        Content::Zero => bytes.fill(0),
        Content::Layer(source) => chain.layers()[source.layer].memory_file().read(piece.first, bytes)?,
    }
    Ok(())
}
