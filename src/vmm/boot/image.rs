//! Kernel images: ELF and bzImage, told apart by their first bytes.

use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{self, BzImage, Elf, KernelLoader};
use vm_memory::{GuestAddress, ReadVolatile};

use super::super::arch::layout;
use super::super::arch::registers::Entry;
use super::super::error::Error;
use crate::config::{BootProtocol, Guest};
use crate::memory::guest_ram::GuestRam;
use crate::vmm::boot::BootError;

/// A kernel loaded into guest memory.
pub struct Image {
    name: String,
    linux64: u64,
    pvh: Option<u64>,
    /// The first address behind it, including memory that it wants zeroed and that is not in the file.
    pub end: u64,
    /// The highest address that a byte of an initrd may have.
    pub initrd_max: u64,
    /// The setup header of a bzImage.
    pub setup: Option<setup_header>,
}

/// A bootloader puts an initrd no higher unless the kernel says otherwise (Linux `Documentation/arch/x86/boot.rst`,
/// `initrd_addr_max` of all 64-bit kernels).
const INITRD_MAX: u64 = 0x7fff_ffff;

impl Image {
    /// Returns the entry point for `protocol`.
    pub fn entry(&self, protocol: BootProtocol) -> Result<Entry, Error> {
        match (protocol, self.pvh) {
            (BootProtocol::Auto | BootProtocol::Pvh, Some(rip)) => Ok(Entry::Pvh { rip }),
            (BootProtocol::Pvh, None) => {
                let what = match self.setup {
                    Some(_) => "it is a bzImage; only ELF kernels have a PVH note",
                    None => "it has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)",
                };
                Err(BootError::BootProtocol { name: self.name.clone(), protocol: "PVH", what }.into())
            }
            (BootProtocol::Auto | BootProtocol::Linux64, _) => Ok(Entry::Linux64 { rip: self.linux64 }),
        }
    }
}

/// Loads the kernel at `path`, or the built-in `guest`.
pub fn load(path: Option<&Path>, guest: Guest, ram: &GuestRam) -> Result<Image, Error> {
    let Some(path) = path else {
        let (elf, name) = guest.elf();
        return load_elf(name.to_string(), &mut Cursor::new(elf), ram);
    };
    // A FIFO is refused at the read; the open does not wait for a writer.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut file = opened.map_err(|source| BootError::KernelOpen { path: path.to_owned(), source })?;
    let name = path.display().to_string();
    let mut head = [0; HEAD_LEN];
    let len = read_head(&file, &mut head).map_err(|source| BootError::KernelOpen { path: path.to_owned(), source })?;
    let head = &head[..len];
    if field(head, SETUP_MAGIC_AT, 4) == Some(SETUP_MAGIC) && !head.starts_with(ELF_MAGIC) {
        return load_bzimage(name, head, &mut file, ram);
    }
    check_elf(head).map_err(|what| BootError::KernelLoad { name: name.clone(), what: what.to_string() })?;
    load_elf(name, &mut file, ram)
}

/// Enough bytes for the setup header of a bzImage and the header of an ELF file.
const HEAD_LEN: usize = 0x280;

fn read_head(file: &File, head: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < head.len() {
        match file.read_at(&mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Reads a little-endian number of `len` bytes; `None` if the file ends before it.
fn field(head: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = head.get(at..at + len)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// System V ABI, ELF header: class and machine.
fn check_elf(head: &[u8]) -> Result<(), &'static str> {
    const CLASS_64: u64 = 2;
    const MACHINE_X86_64: u64 = 62;
    if !head.starts_with(ELF_MAGIC) {
        return Err("it is neither an ELF file nor a bzImage");
    }
    match (field(head, 4, 1), field(head, 18, 2)) {
        (Some(CLASS_64), Some(MACHINE_X86_64)) => Ok(()),
        (Some(1), _) => Err("it is a 32-bit kernel; tvmm boots 64-bit ones"),
        (Some(_), Some(_)) => Err("it is not a kernel for x86-64"),
        _ => Err("it is cut short"),
    }
}

fn load_elf<F: Read + ReadVolatile + Seek>(name: String, image: &mut F, ram: &GuestRam) -> Result<Image, Error> {
    let loaded = Elf::load(ram.boot_view()?, None, image, Some(GuestAddress(layout::HIMEM)))
        .map_err(|error| BootError::KernelLoad { name: name.clone(), what: load_problem(&error) })?;
    // The loader has written the file's bytes; the rest of the kernel must lie in memory too.
    check_end(&name, loaded.kernel_end, ram)?;
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    let linux64 = loaded.kernel_load.0;
    let end = loaded.kernel_end;
    Ok(Image { name, linux64, pvh, end, initrd_max: INITRD_MAX, setup: None })
}

fn load_problem(error: &loader::Error) -> String {
    match error {
        loader::Error::Elf(loader::elf::Error::ReadKernelImage)
        | loader::Error::Bzimage(loader::bzimage::Error::ReadBzImageCompressedKernel) => {
            "it is cut short, or a segment of it lies outside guest memory".to_string()
        }
        other => other.to_string(),
    }
}

fn check_end(name: &str, end: u64, ram: &GuestRam) -> Result<(), Error> {
    let ram_end = ram.low_end();
    if end > ram_end { Err(BootError::KernelTooLarge { name: name.to_string(), end, ram_end }.into()) } else { Ok(()) }
}

const SETUP_MAGIC_AT: usize = 0x202;
const SETUP_MAGIC: u64 = u32::from_le_bytes(*b"HdrS") as u64;

/// The place of the kernel by its setup header (Linux `Documentation/arch/x86/boot.rst`).
struct Setup {
    load: u64,
    /// The first address behind the unpacked kernel.
    end: u64,
    initrd_max: u64,
    /// Bytes, beyond rounding up, by which `syssize` exceeds the file.
    missing: u64,
}

/// Reads a setup header as QEMU and GRUB do, which start kernels whose other fields are wrong. The protected-mode
/// kernel is as long as the file behind the setup sectors, whatever `syssize` says (memtest86+ rounds it up past the
/// end of its file). `pref_address` counts only for a relocatable kernel and only above 1 MiB, where all others are
/// loaded. `code32_start` is not used.
fn read_setup(head: &[u8], file_len: u64) -> Result<Setup, &'static str> {
    const CUT: &str = "it is cut short";
    const PROTOCOL_2_12: u64 = 0x20c;
    const XLF_KERNEL_64: u64 = 1;
    const LOADED_HIGH: u64 = 1;
    /// The unit of `syssize`.
    const PARAGRAPH: u64 = 16;
    let get = |at, len| field(head, at, len).ok_or(CUT);
    if get(0x206, 2)? < PROTOCOL_2_12 {
        return Err("its boot protocol is older than 2.12 (Linux 3.8), which cannot say that it is 64-bit");
    }
    if get(0x236, 2)? & XLF_KERNEL_64 == 0 {
        return Err("it is a 32-bit kernel; tvmm boots 64-bit ones");
    }
    if get(0x211, 1)? & LOADED_HIGH == 0 {
        return Err("it wants to be loaded below 1 MiB");
    }
    let kernel_len = file_len.checked_sub(setup_len(head).ok_or(CUT)?).filter(|len| *len > ENTRY_64).ok_or(CUT)?;
    let relocatable = get(0x234, 1)? != 0;
    let preferred = get(0x258, 8)?;
    let load = if relocatable && preferred >= layout::HIMEM { preferred } else { layout::HIMEM };
    let end = load.checked_add(get(0x260, 4)?.max(kernel_len)).ok_or("its size makes no sense")?;
    let missing = (get(0x1f4, 4)? * PARAGRAPH).saturating_sub(kernel_len.next_multiple_of(PARAGRAPH));
    Ok(Setup { load, end, initrd_max: get(0x22c, 4)?, missing })
}

/// Bytes before the protected-mode kernel: the boot sector and the setup sectors (0 means 4).
fn setup_len(head: &[u8]) -> Option<u64> {
    let sectors = match field(head, 0x1f1, 1)? {
        0 => 4,
        sectors => sectors,
    };
    Some((sectors + 1) * 512)
}

/// The 64-bit entry point, from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

fn load_bzimage(name: String, head: &[u8], file: &mut File, ram: &GuestRam) -> Result<Image, Error> {
    let failed = |what: String| BootError::KernelLoad { name: name.clone(), what };
    let file_len = file.metadata().map_err(|error| failed(error.to_string()))?.len();
    let setup = read_setup(head, file_len).map_err(|what| failed(what.to_string()))?;
    check_end(&name, setup.end, ram)?;
    if setup.missing > 0 {
        tracing::warn!(
            kernel = %name, missing = setup.missing,
            "The header of the kernel image says more bytes than its file has; the file may be cut short"
        );
    }
    // No lowest address: the loader would compare it with `code32_start`.
    let loaded = BzImage::load(ram.boot_view()?, Some(GuestAddress(setup.load)), file, None)
        .map_err(|error| failed(load_problem(&error)))?;
    let end = setup.end.max(loaded.kernel_end);
    let linux64 = setup.load + ENTRY_64;
    let header = loaded.setup_header;
    Ok(Image { name, linux64, pvh: None, end, initrd_max: setup.initrd_max, setup: header })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage() -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[3]);
        put(0x1f4, &100_u32.to_le_bytes());
        put(SETUP_MAGIC_AT, b"HdrS");
        put(0x206, &0x20f_u16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000_u32.to_le_bytes());
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x234, &[1]);
        put(0x236, &1_u16.to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &0x300_0000_u32.to_le_bytes());
        head
    }

    #[test]
    fn setup_header_says_where_a_bzimage_goes() {
        let setup = read_setup(&bzimage(), 2048 + 1600).unwrap();
        assert_eq!((setup.load, setup.end, setup.initrd_max), (0x100_0000, 0x400_0000, 0x7fff_ffff));
    }

    #[test]
    fn fields_that_other_loaders_ignore_stop_no_bzimage() {
        const LEN: u64 = 2048 + 1600;
        for (at, bytes, load) in [
            // syssize: one paragraph too many, as memtest86+ has it; nonsense; none.
            (0x1f4, &[101, 0, 0, 0][..], 0x100_0000),
            (0x1f4, &[0xff; 4], 0x100_0000),
            (0x1f4, &[0; 4], 0x100_0000),
            // boot_flag, root_dev, jump, kernel_version, code32_start
            (0x1fe, &[0; 2], 0x100_0000),
            (0x1fc, &[0xff; 2], 0x100_0000),
            (0x200, &[0; 2], 0x100_0000),
            (0x20e, &[0xff; 2], 0x100_0000),
            (0x214, &[0; 4], 0x100_0000),
            // pref_address
            (0x258, &[0; 8], layout::HIMEM),
            (0x258, &[0, 0, 9, 0, 0, 0, 0, 0], layout::HIMEM),
            (0x234, &[0], layout::HIMEM),
        ] {
            let mut head = bzimage();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            let setup = read_setup(&head, LEN).unwrap_or_else(|what| panic!("{at:#x} {bytes:x?}: {what}"));
            assert_eq!((setup.load, setup.end), (load, load + 0x300_0000), "{at:#x} {bytes:x?}");
        }
    }

    #[test]
    fn bzimage_takes_as_much_memory_as_its_file_has() {
        let mut head = bzimage();
        head[0x260..0x264].fill(0);
        assert_eq!(read_setup(&head, 2048 + 16 * 0x1234 + 8).unwrap().end, 0x100_0000 + 16 * 0x1234 + 8);
        // Boot sector, four setup sectors.
        head[0x1f1] = 0;
        assert_eq!(read_setup(&head, 2560 + 4096).unwrap().end, 0x100_0000 + 4096);
    }

    #[test]
    fn bzimages_that_cannot_be_booted_are_refused() {
        for (at, bytes, said) in [
            (0x206, &[0x0b, 2][..], "older than 2.12"),
            (0x236, &[0], "32-bit"),
            (0x211, &[0], "below 1 MiB"),
            (0x258, &[0xff; 8], "no sense"),
        ] {
            let mut head = bzimage();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(read_setup(&head, 1 << 20).is_err_and(|what| what.contains(said)), "{said}");
        }
        for len in [0x1f1, 0x210, 0x235, 0x25f, 0x263] {
            assert!(read_setup(&bzimage()[..len], 1 << 20).is_err_and(|what| what.contains("cut short")), "{len:#x}");
        }
        // No entry point.
        for len in [0x280, 2047, 2048, 2048 + 0x200] {
            assert!(read_setup(&bzimage(), len).is_err_and(|what| what.contains("cut short")), "{len:#x}");
        }
    }
}
