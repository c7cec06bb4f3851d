//! The profile's file: a container of sections (`docs/profiles.md`). Classes and order are packed by the rank of a page
//! in the working set, so that a page takes less than two bytes even if the order is random.

use std::path::Path;

use super::bits::{BitReader, BitWriter, put_varint, take_varint};
use super::contents::{Frequency, MAX_RUNS, Profile};
use super::order::{MAX_LAYERS, Order};
use super::order_code::{self, Ranks};
use super::recorder_kind::RecorderKind;
use super::sets;
use crate::snapshot::{
    Container, Extent, Gfn, PageSet, Section, SectionInfo, SectionKind, SnapshotId, read_limited, write_container,
    write_limited,
};
use crate::tiering::Error;

/// The largest profile, in bytes.
const FILE_LIMIT: u64 = 64 << 20;
const VERSION: u32 = 1;

/// Bytes of the header section before the function.
const FIXED_LEN: usize = 40;
const SEES_READS: u8 = 1;

const WRITTEN: u32 = 0;
const UNCLASSIFIED: u32 = 1;

const NONE: u8 = 0;
const ALL: u8 = 1;
const SOME: u8 = 2;

impl Profile {
    /// Reads and checks a profile.
    ///
    /// # Errors
    /// Errors of the container or its content; a file is never trusted.
    pub fn load(path: &Path) -> Result<Profile, Error> {
        decode(&Container::read(path, FILE_LIMIT)?)
    }

    /// The bytes of a profile's file, unchecked but bounded; a plan's name has their digest.
    ///
    /// # Errors
    /// [`crate::snapshot::Error::Io`], or that it is no regular file or too large.
    pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
        Ok(read_limited(path, FILE_LIMIT)?)
    }

    /// Reads a profile held in memory.
    ///
    /// # Errors
    /// As for [`Profile::load`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Profile, Error> {
        decode(&Container::parse(bytes)?)
    }

    /// The profile as a file.
    ///
    /// # Errors
    /// [`Error::Profile`] for a profile that contradicts itself.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        self.check().map_err(|problem| Error::profile("The profile", problem))?;
        Ok(write_container(&sections_of(self)))
    }

    /// Writes the profile beside its name, makes it durable, and renames it; an older file of that name is replaced.
    /// Returns its size in bytes.
    ///
    /// # Errors
    /// As for [`Profile::to_bytes`], and failures of the file system.
    pub fn save(&self, path: &Path) -> Result<u64, Error> {
        let bytes = self.to_bytes()?;
        write_limited(path, &bytes, FILE_LIMIT)?;
        Ok(bytes.len() as u64)
    }
}

/// The profile's sections, in file order.
pub(super) fn sections_of(profile: &Profile) -> Vec<Section> {
    let pages = profile.working_set();
    let ranks = Ranks::of(&pages);
    let section = |kind, instance, payload| Section { kind, instance, version: VERSION, payload };
    let mut sections = vec![
        section(SectionKind::ProfileHeader, 0, encode_header(profile)),
        section(SectionKind::ProfilePages, 0, sets::encode(&pages)),
        section(SectionKind::ProfileClass, WRITTEN, encode_class(&profile.written, &ranks)),
        section(SectionKind::ProfileClass, UNCLASSIFIED, encode_class(&profile.unclassified, &ranks)),
    ];
    match &profile.order {
        Order::Unknown => {}
        Order::Exact(extents) => {
            sections.push(section(SectionKind::ProfileOrder, 0, order_code::encode(extents, &ranks)))
        }
        Order::Layers(layers) => {
            let layer = |(index, layer): (usize, &PageSet)| {
                section(SectionKind::ProfileLayer, index as u32, sets::encode(layer))
            };
            sections.extend(layers.iter().enumerate().map(layer));
        }
    }
    if !profile.times_ns.is_empty() {
        sections.push(section(SectionKind::ProfileTimes, 0, encode_times(&profile.times_ns)));
    }
    let frequency = &profile.frequency;
    for (kind, counts) in
        [(SectionKind::ProfileTouchedIn, &frequency.touched), (SectionKind::ProfileWrittenIn, &frequency.written)]
    {
        sections.extend(counts.iter().map(|(count, pages)| section(kind, *count, sets::encode(pages))));
    }
    sections
}

fn encode_header(profile: &Profile) -> Vec<u8> {
    let order = match profile.order {
        Order::Unknown => 0,
        Order::Exact(_) => 1,
        Order::Layers(_) => 2,
    };
    let mut out = profile.snapshot.0.to_vec();
    out.extend([recorder_number(profile.recorder), order, u8::from(profile.sees_reads) * SEES_READS, 0]);
    out.extend(profile.runs.to_le_bytes());
    out.extend(profile.function.as_bytes());
    out
}

fn recorder_number(recorder: RecorderKind) -> u8 {
    match recorder {
        RecorderKind::Uffd => 1,
        RecorderKind::Mincore => 2,
        RecorderKind::Pagemap => 3,
        RecorderKind::DirtyLog => 4,
        RecorderKind::Merged => 255,
    }
}

/// A subset of the working set: none, all, or a bit per page of it in the order of their ranks.
fn encode_class(class: &PageSet, ranks: &Ranks) -> Vec<u8> {
    if class.is_empty() {
        return vec![NONE];
    }
    if class.len() == ranks.pages() {
        return vec![ALL];
    }
    let mut out = vec![SOME];
    let mut bits = BitWriter::default();
    let mut at = 0;
    for run in class.runs() {
        // Classes are parts of the working set: `check` has made sure.
        let Some(rank) = ranks.rank(run.first) else { continue };
        (at..rank).for_each(|_| bits.bits(0, 1));
        (0..run.pages).for_each(|_| bits.bits(1, 1));
        at = rank + run.pages;
    }
    (at..ranks.pages()).for_each(|_| bits.bits(0, 1));
    out.extend(bits.finish());
    out
}

fn encode_times(times_ns: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut last = 0;
    for &time in times_ns {
        put_varint(&mut out, time.saturating_sub(last));
        last = time;
    }
    out
}

fn decode(container: &Container) -> Result<Profile, Error> {
    let malformed = |problem: String| Error::profile(container.object(), problem);
    container.sections().iter().try_for_each(check_section).map_err(malformed)?;
    let header = container.section(SectionKind::ProfileHeader, 0)?;
    let (mut profile, order) = decode_header(header).map_err(malformed)?;
    let pages = sets::decode(container.section(SectionKind::ProfilePages, 0)?).map_err(malformed)?;
    let ranks = Ranks::of(&pages);
    let class = |which| {
        let bytes = container.section(SectionKind::ProfileClass, which)?;
        decode_class(bytes, &pages, &ranks).map_err(malformed)
    };
    profile.written = class(WRITTEN)?;
    profile.unclassified = class(UNCLASSIFIED)?;
    profile.read = pages.difference(&profile.written).difference(&profile.unclassified);
    profile.order = match order {
        0 => Order::Unknown,
        1 => {
            let bytes = container.section(SectionKind::ProfileOrder, 0)?;
            Order::Exact(order_code::decode(bytes, &ranks).map_err(malformed)?)
        }
        2 => {
            Order::Layers(decode_sets(container, SectionKind::ProfileLayer)?.into_iter().map(|(_, set)| set).collect())
        }
        other => return Err(malformed(format!("its order is of the unknown form {other}"))),
    };
    if container.info(SectionKind::ProfileTimes, 0).is_ok() {
        profile.times_ns = decode_times(container.section(SectionKind::ProfileTimes, 0)?).map_err(malformed)?;
    }
    profile.frequency = Frequency {
        touched: decode_sets(container, SectionKind::ProfileTouchedIn)?,
        written: decode_sets(container, SectionKind::ProfileWrittenIn)?,
    };
    profile.check().map_err(malformed)?;
    // A section that a reader would silently drop does not belong in the file.
    if sections_of(&profile).len() != container.sections().len() {
        return Err(malformed("it has sections that contradict its header".to_string()));
    }
    Ok(profile)
}

fn check_section(info: &SectionInfo) -> Result<(), String> {
    let instances = match info.kind {
        SectionKind::ProfileHeader
        | SectionKind::ProfilePages
        | SectionKind::ProfileOrder
        | SectionKind::ProfileTimes => 1,
        SectionKind::ProfileClass => 2,
        SectionKind::ProfileLayer => MAX_LAYERS as u32,
        SectionKind::ProfileTouchedIn | SectionKind::ProfileWrittenIn => MAX_RUNS,
        other => return Err(format!("it has a section of kind {}, which is none of a profile's", other.number())),
    };
    match (info.version, info.instance < instances) {
        (VERSION, true) => Ok(()),
        (VERSION, false) => Err(format!("section {} has instance {}", info.kind.number(), info.instance)),
        (other, _) => Err(format!("section {} is of version {other}, this build reads {VERSION}", info.kind.number())),
    }
}

fn decode_header(bytes: &[u8]) -> Result<(Profile, u8), String> {
    let (Some((fixed, function)), Some((id, rest))) =
        (bytes.split_first_chunk::<FIXED_LEN>(), bytes.split_first_chunk::<32>())
    else {
        return Err("its header is too short".to_string());
    };
    let [recorder, order, flags, reserved, ..] = *rest else {
        return Err("its header is too short".to_string());
    };
    let known = RecorderKind::ALL.into_iter().find(|kind| recorder_number(*kind) == recorder);
    let recorder = known.ok_or_else(|| format!("its recorder {recorder} is unknown"))?;
    if flags & !SEES_READS != 0 || reserved != 0 {
        return Err("reserved bits of its header are not zero".to_string());
    }
    let function = std::str::from_utf8(function).map_err(|_| "its function is not UTF-8".to_string())?;
    let mut profile = Profile::new(SnapshotId(*id), recorder, function);
    profile.sees_reads = flags & SEES_READS != 0;
    profile.runs = u32::from_le_bytes([fixed[36], fixed[37], fixed[38], fixed[39]]);
    Ok((profile, order))
}

fn decode_class(bytes: &[u8], pages: &PageSet, ranks: &Ranks) -> Result<PageSet, String> {
    let (form, bits) = match bytes {
        [form, bits @ ..] => (*form, bits),
        [] => return Err("a class has no form".to_string()),
    };
    match form {
        NONE if bits.is_empty() => Ok(PageSet::new()),
        // The empty set is written as none.
        ALL if bits.is_empty() && !pages.is_empty() => Ok(pages.clone()),
        SOME if bits.len() as u64 == ranks.pages().div_ceil(8) => {
            let class = class_of_bits(bits, ranks)?;
            let canonical = !class.is_empty() && class.len() != ranks.pages();
            if canonical { Ok(class) } else { Err("a class lists none or all pages one by one".to_string()) }
        }
        _ => Err(format!("a class of form {form} has {} bytes", bits.len())),
    }
}

fn class_of_bits(bytes: &[u8], ranks: &Ranks) -> Result<PageSet, String> {
    let mut bits = BitReader::new(bytes);
    let mut class = PageSet::new();
    let mut run: Option<Extent> = None;
    let flush = |run: Option<Extent>, class: &mut PageSet| {
        run.into_iter().flat_map(|run| ranks.extents(run.first.0, run.pages)).for_each(|pages| class.insert_run(pages));
    };
    for rank in 0..ranks.pages() {
        match (bits.bits(1).ok_or("a class ends early")? == 1, &mut run) {
            (true, Some(run)) => run.pages += 1,
            (true, None) => run = Some(Extent { first: Gfn(rank), pages: 1 }),
            (false, _) => flush(run.take(), &mut class),
        }
    }
    flush(run, &mut class);
    if bits.is_finished() { Ok(class) } else { Err("something follows a class".to_string()) }
}

fn decode_times(mut bytes: &[u8]) -> Result<Vec<u64>, String> {
    let mut times = Vec::new();
    let mut last = 0_u64;
    while !bytes.is_empty() {
        let delta = take_varint(&mut bytes).ok_or("its times are malformed")?;
        last = last.checked_add(delta).ok_or("its times are malformed")?;
        times.push(last);
    }
    if times.is_empty() { Err("it has no times where it should".to_string()) } else { Ok(times) }
}

/// All sections of a kind, by instance.
fn decode_sets(container: &Container, kind: SectionKind) -> Result<Vec<(u32, PageSet)>, Error> {
    let of_kind = container.sections().iter().filter(|info| info.kind == kind);
    let mut sets = of_kind
        .map(|info| {
            let set = sets::decode(container.payload(info)?);
            Ok((info.instance, set.map_err(|problem| Error::profile(container.object(), problem))?))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    sets.sort_unstable_by_key(|(instance, _)| *instance);
    Ok(sets)
}
