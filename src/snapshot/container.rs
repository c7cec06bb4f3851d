//! The binary container of `vmstate`, `pages` and the single-file snapshot: a fixed header, a table of sections, the
//! sections. Byte-exact description: `docs/snapshot-format.md`.
//!
//! Everything is checked before it is used: the header's checksum before its fields, a count before the table it
//! counts, the table's checksum before an entry, an entry's bounds before a payload, a payload's checksum before it
//! is handed out.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::{Error, Result, files};

/// The format this build writes; it reads every minor version of this major version.
pub const FORMAT_MAJOR: u16 = 1;
/// See [`FORMAT_MAJOR`].
pub const FORMAT_MINOR: u16 = 0;

/// The first bytes of every container.
pub const CONTAINER_MAGIC: [u8; 8] = *b"TVMMSNAP";
pub(super) const HEADER_LEN: usize = 64;
pub(super) const ENTRY_LEN: usize = 40;
/// The most sections a container may have.
const MAX_SECTIONS: usize = 4096;
const VERSION_LEN: usize = 16;

/// The content of a section. Numbers are part of the format and are never used again for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SectionKind {
    /// State common to the whole machine.
    Machine,
    /// KVM's state of the VM (interrupt controllers, timer, clock).
    Vm,
    /// One vCPU; the instance is its index.
    Vcpu,
    /// The serial port.
    Serial,
    /// The keyboard controller.
    I8042,
    /// The VM generation id.
    VmGenId,
    /// A virtio device; the instance is its place.
    Virtio,
    /// The metadata that the host gives the VM.
    Metadata,
    /// The manifest (JSON), in the single-file form only.
    Manifest,
    /// The pages the layer holds.
    PagesHeld,
    /// The pages the layer knows to be zero.
    PagesZero,
    /// Checksums of the held pages.
    ChunkChecksums,
    /// The header of a profile: its snapshot, recorder, number of runs and function.
    ProfileHeader,
    /// The pages of a profile.
    ProfilePages,
    /// A class of a profile's pages; the instance is the class.
    ProfileClass,
    /// The exact order of a profile.
    ProfileOrder,
    /// A layer of a profile; the instance is its index.
    ProfileLayer,
    /// Times along a profile's order.
    ProfileTimes,
    /// Pages that some runs of a merged profile touched; the instance is how many.
    ProfileTouchedIn,
    /// Pages that some runs of a merged profile wrote; the instance is how many.
    ProfileWrittenIn,
    /// A restore plan.
    Plan,
    /// The identity of an image.
    Image,
    /// Checksums of an image's pages.
    ImageSums,
    /// A kind that this build has no name for.
    Other(u32),
}

const KINDS: [(SectionKind, u32); 23] = [
    (SectionKind::Machine, 1),
    (SectionKind::Vm, 2),
    (SectionKind::Vcpu, 3),
    (SectionKind::Serial, 4),
    (SectionKind::I8042, 5),
    (SectionKind::VmGenId, 6),
    (SectionKind::Virtio, 7),
    (SectionKind::Metadata, 8),
    (SectionKind::Manifest, 16),
    (SectionKind::PagesHeld, 32),
    (SectionKind::PagesZero, 33),
    (SectionKind::ChunkChecksums, 34),
    (SectionKind::ProfileHeader, 64),
    (SectionKind::ProfilePages, 65),
    (SectionKind::ProfileClass, 66),
    (SectionKind::ProfileOrder, 67),
    (SectionKind::ProfileLayer, 68),
    (SectionKind::ProfileTimes, 69),
    (SectionKind::ProfileTouchedIn, 70),
    (SectionKind::ProfileWrittenIn, 71),
    (SectionKind::Plan, 80),
    (SectionKind::Image, 81),
    (SectionKind::ImageSums, 82),
];

impl SectionKind {
    /// The number in the file.
    pub fn number(self) -> u32 {
        match self {
            SectionKind::Other(number) => number,
            _ => KINDS.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, number)| *number),
        }
    }

    /// True if the kind belongs to this room, so that no caller may write one.
    pub(crate) fn is_reserved(self) -> bool {
        (16..64).contains(&self.number())
    }
}

impl From<u32> for SectionKind {
    fn from(number: u32) -> SectionKind {
        KINDS.iter().find(|(_, n)| *n == number).map_or(SectionKind::Other(number), |(kind, _)| *kind)
    }
}

/// A section to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The kind of content.
    pub kind: SectionKind,
    /// Index among sections of the same kind.
    pub instance: u32,
    /// The version of the payload's encoding; its owner's business.
    pub version: u32,
    /// The bytes.
    pub payload: Vec<u8>,
}

/// A section that a container has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionInfo {
    /// The kind of content.
    pub kind: SectionKind,
    /// Index among sections of the same kind.
    pub instance: u32,
    /// The version of the payload's encoding.
    pub version: u32,
    /// The payload's bytes within the container.
    pub(crate) range: Range<usize>,
    crc: u32,
}

impl SectionInfo {
    /// The payload's length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "the length of the payload, not a collection")]
    pub fn len(&self) -> u64 {
        self.range.len() as u64
    }
}

/// A container whose structure was checked; each payload is checked on access.
#[derive(Clone, Debug)]
pub struct Container {
    object: String,
    bytes: Vec<u8>,
    sections: Vec<SectionInfo>,
    writer: String,
}

impl Container {
    /// Checks the structure of a container held in memory.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::BadMagic`], [`Error::Checksum`], [`Error::FutureFormat`] or
    /// [`Error::Malformed`], in the order in which `docs/snapshot-format.md` lists the checks.
    pub fn parse(bytes: Vec<u8>) -> Result<Container> {
        Container::parse_named("container".to_string(), bytes)
    }

    /// Reads a container file of at most `limit` bytes with one read.
    ///
    /// # Errors
    /// As for [`Container::parse`]; [`Error::TooLarge`], [`Error::NotAFile`], [`Error::Io`].
    pub fn read(path: &Path, limit: u64) -> Result<Container> {
        Container::parse_named(path.display().to_string(), files::read_limited(path, limit)?)
    }

    /// As [`Container::parse`], for bytes that are called `object` in errors.
    pub(crate) fn parse_named(object: String, bytes: Vec<u8>) -> Result<Container> {
        let header = Header::parse(&object, &bytes)?;
        let sections = parse_table(&object, &bytes, &header)?;
        Ok(Container { object, bytes, sections, writer: header.writer })
    }

    /// The container's name in errors: its path.
    pub fn object(&self) -> &str {
        &self.object
    }

    /// The version of the tvmm that wrote the container.
    pub fn writer(&self) -> &str {
        &self.writer
    }

    /// The length of the whole container in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a container has a header at least")]
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All sections in file order. A reader that must understand *every* section refuses the kinds it does not know.
    pub fn sections(&self) -> &[SectionInfo] {
        &self.sections
    }

    /// The payload of a section, after its checksum was checked.
    ///
    /// # Errors
    /// [`Error::MissingSection`], [`Error::Checksum`].
    pub fn section(&self, kind: SectionKind, instance: u32) -> Result<&[u8]> {
        self.payload(self.info(kind, instance)?)
    }

    /// The table's entry of a section.
    ///
    /// # Errors
    /// [`Error::MissingSection`].
    pub fn info(&self, kind: SectionKind, instance: u32) -> Result<&SectionInfo> {
        let number = kind.number();
        let found = self.sections.iter().find(|info| info.kind.number() == number && info.instance == instance);
        found.ok_or_else(|| Error::MissingSection { object: self.object.clone(), kind: number, instance })
    }

    /// The payload of one of this container's [`sections`](Container::sections), checked.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub fn payload(&self, info: &SectionInfo) -> Result<&[u8]> {
        let bytes = self.bytes.get(info.range.clone()).unwrap_or_default();
        let part = || format!("section {} instance {}", info.kind.number(), info.instance);
        check_crc(&self.object, part, info.crc, bytes)?;
        Ok(bytes)
    }

    /// A copy of the sections whose kind `wanted` accepts, ready to be written again.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub(crate) fn copy_sections(&self, wanted: impl Fn(SectionKind) -> bool) -> Result<Vec<Section>> {
        let copy = |info: &SectionInfo| {
            let payload = self.payload(info)?.to_vec();
            Ok(Section { kind: info.kind, instance: info.instance, version: info.version, payload })
        };
        self.sections.iter().filter(|info| wanted(info.kind)).map(copy).collect()
    }
}

struct Header {
    section_count: usize,
    table_crc: u32,
    writer: String,
}

impl Header {
    fn parse(object: &str, bytes: &[u8]) -> Result<Header> {
        let have = bytes.len() as u64;
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(Error::Truncated { object: object.to_string(), have, need: HEADER_LEN as u64 });
        };
        if !header.starts_with(&CONTAINER_MAGIC) {
            return Err(Error::BadMagic { object: object.to_string() });
        }
        check_crc(object, || "header".to_string(), u32_at(header, 60), &header[..60])?;
        let writer = printable(&header[32..32 + VERSION_LEN]);
        let major = u16_at(header, 8);
        let minor = u16_at(header, 10);
        if major != FORMAT_MAJOR {
            let (format, reads) = (format!("{major}.{minor}"), format!("{FORMAT_MAJOR}.x"));
            return Err(Error::FutureFormat { object: object.to_string(), writer, format, reads });
        }
        let header_len = u32_at(header, 12);
        let entry_len = u32_at(header, 20);
        let file_len = u64_at(header, 24);
        if header_len as usize != HEADER_LEN || entry_len as usize != ENTRY_LEN {
            return Err(Error::malformed(
                object,
                format!("its header says {header_len} and {entry_len} bytes per entry"),
            ));
        }
        if u32_at(header, 52) != 0 || u32_at(header, 56) != 0 {
            return Err(Error::malformed(object, "reserved fields of its header are not zero"));
        }
        if file_len > have {
            return Err(Error::Truncated { object: object.to_string(), have, need: file_len });
        }
        if file_len < have {
            return Err(Error::malformed(object, format!("{} bytes follow its end", have - file_len)));
        }
        Ok(Header { section_count: u32_at(header, 16) as usize, table_crc: u32_at(header, 48), writer })
    }
}

fn parse_table(object: &str, bytes: &[u8], header: &Header) -> Result<Vec<SectionInfo>> {
    let count = header.section_count;
    if count > MAX_SECTIONS {
        return Err(Error::malformed(
            object,
            format!("it claims {count} sections, at most {MAX_SECTIONS} are allowed"),
        ));
    }
    let table_end = HEADER_LEN + count * ENTRY_LEN;
    let Some(table) = bytes.get(HEADER_LEN..table_end) else {
        return Err(Error::Truncated { object: object.to_string(), have: bytes.len() as u64, need: table_end as u64 });
    };
    check_crc(object, || "section table".to_string(), header.table_crc, table)?;
    let mut sections = Vec::with_capacity(count);
    let mut seen = HashSet::with_capacity(count);
    let mut at = table_end;
    for (index, entry) in table.chunks_exact(ENTRY_LEN).enumerate() {
        let offset = u64_at(entry, 16);
        let length = u64_at(entry, 24);
        if u32_at(entry, 12) != 0 || u32_at(entry, 36) != 0 {
            return Err(Error::malformed(object, format!("reserved fields of section entry {index} are not zero")));
        }
        if offset != at as u64 {
            return Err(Error::malformed(object, format!("section entry {index} is at offset {offset}, not at {at}")));
        }
        let end = offset.checked_add(length).filter(|end| *end <= bytes.len() as u64);
        let Some(end) = end.and_then(|end| usize::try_from(end).ok()) else {
            return Err(Error::malformed(object, format!("section entry {index} claims {length} bytes")));
        };
        let kind = u32_at(entry, 0);
        let version = u32_at(entry, 4);
        let instance = u32_at(entry, 8);
        if !seen.insert((kind, instance)) {
            return Err(Error::malformed(object, format!("it has section {kind} instance {instance} twice")));
        }
        let crc = u32_at(entry, 32);
        sections.push(SectionInfo { kind: kind.into(), instance, version, range: at..end, crc });
        at = end;
    }
    if at != bytes.len() {
        return Err(Error::malformed(object, format!("{} bytes belong to no section", bytes.len() - at)));
    }
    Ok(sections)
}

fn check_crc(object: &str, part: impl FnOnce() -> String, stored: u32, bytes: &[u8]) -> Result<()> {
    let computed = crc32c::crc32c(bytes);
    if computed != stored {
        return Err(Error::Checksum { object: object.to_string(), part: part(), stored, computed });
    }
    Ok(())
}

/// The bytes of a container with these sections in this order. The caller avoids input that `Container::parse` would
/// refuse: a pair of kind and instance given twice, more than 4096 sections. The snapshot writer checks both.
pub fn write_container(sections: &[Section]) -> Vec<u8> {
    let file_len = container_len(sections);
    let mut table = Vec::with_capacity(sections.len() * ENTRY_LEN);
    let mut offset = (HEADER_LEN + sections.len() * ENTRY_LEN) as u64;
    for section in sections {
        let length = section.payload.len() as u64;
        for field in [section.kind.number(), section.version, section.instance, 0] {
            table.extend_from_slice(&field.to_le_bytes());
        }
        table.extend_from_slice(&offset.to_le_bytes());
        table.extend_from_slice(&length.to_le_bytes());
        table.extend_from_slice(&crc32c::crc32c(&section.payload).to_le_bytes());
        table.extend_from_slice(&0_u32.to_le_bytes());
        offset += length;
    }
    let mut out = Vec::with_capacity(file_len as usize);
    out.extend_from_slice(&CONTAINER_MAGIC);
    out.extend_from_slice(&FORMAT_MAJOR.to_le_bytes());
    out.extend_from_slice(&FORMAT_MINOR.to_le_bytes());
    for field in [HEADER_LEN as u32, sections.len() as u32, ENTRY_LEN as u32] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&file_len.to_le_bytes());
    let mut version = [0; VERSION_LEN];
    let text = env!("CARGO_PKG_VERSION").as_bytes();
    let text = &text[..text.len().min(VERSION_LEN)];
    version[..text.len()].copy_from_slice(text);
    out.extend_from_slice(&version);
    for field in [crc32c::crc32c(&table), 0, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    let header_crc = crc32c::crc32c(&out);
    out.extend_from_slice(&header_crc.to_le_bytes());
    out.extend_from_slice(&table);
    sections.iter().for_each(|section| out.extend_from_slice(&section.payload));
    out
}

/// The number of bytes that [`write_container`] would produce.
pub(crate) fn container_len(sections: &[Section]) -> u64 {
    container_len_of(sections.iter().map(|section| section.payload.len() as u64))
}

/// The length of a container whose sections have these payload lengths. Saturates.
pub(crate) fn container_len_of(payload_lens: impl Iterator<Item = u64>) -> u64 {
    payload_lens.fold(HEADER_LEN as u64, |sum, len| sum.saturating_add(ENTRY_LEN as u64).saturating_add(len))
}

/// Refuses sections that a reader would refuse.
pub(crate) fn check_sections(sections: &[Section]) -> Result<()> {
    let mut seen = HashSet::new();
    for section in sections {
        let kind = section.kind.number();
        let instance = section.instance;
        let bad = |problem| Err(Error::BadSection { kind, instance, problem });
        if section.kind.is_reserved() {
            return bad("kinds 16 to 63 belong to the snapshot room");
        }
        if !seen.insert((kind, instance)) {
            return bad("it is given twice");
        }
        if seen.len() > MAX_SECTIONS - 16 {
            return bad("there are too many sections");
        }
    }
    Ok(())
}

/// The part of a file's bytes that may be shown to a person.
fn printable(bytes: &[u8]) -> String {
    let text = bytes.iter().take_while(|byte| **byte != 0);
    text.map(|byte| if byte.is_ascii_graphic() { *byte as char } else { '?' }).collect()
}

/// Reads past the end give zero; callers have checked the length.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}
