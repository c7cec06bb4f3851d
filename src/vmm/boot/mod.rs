//! Loads a kernel into guest memory and describes the machine to it.

mod error;
mod image;
mod initrd;
mod params;

pub use error::BootError;

use std::ffi::CString;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress};

use super::arch::registers::Entry;
use super::arch::{Platform, acpi, layout, mptable};
use super::error::Error;
use crate::config::{BootSource, TvmmConfig};
use crate::memory::guest_ram::GuestRam;
use crate::sys::guest_memory::UnguardedMemory;

use initrd::Initrd;

/// Loads the kernel and initrd of `source` into `ram`, with the structures of the boot protocol in `config` and the
/// tables that describe `platform`. Returns the boot vCPU's entry point.
pub fn load(source: &BootSource, config: &TvmmConfig, platform: Platform<'_>, ram: &GuestRam) -> Result<Entry, Error> {
    let image = image::load(source.kernel_image_path.as_deref(), config.guest.unwrap_or_default(), ram)?;
    let entry = image.entry(config.boot_protocol)?;
    let initrd = source.initrd_path.as_deref().map(|path| Initrd::load(path, &image, ram)).transpose()?;
    let cmdline_len = write_cmdline(source.boot_args_or_default(), platform, ram.boot_view()?)?;
    let machine = params::MachineParams { initrd, acpi: platform.acpi, cmdline_len };
    match entry {
        Entry::Linux64 { .. } => params::write_linux64(&image, &machine, ram)?,
        Entry::Pvh { .. } => params::write_pvh(&machine, ram)?,
    }
    write_tables(platform, ram)?;
    Ok(entry)
}

/// Writes the command line; returns its length. Without ACPI it also describes the virtio devices.
fn write_cmdline(args: &str, platform: Platform<'_>, memory: &UnguardedMemory) -> Result<u32, Error> {
    if args.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong { len: args.len() }.into());
    }
    if !args.is_ascii() || args.contains('\0') {
        return Err(BootError::CmdlineCharacters.into());
    }
    let failed = |error: &dyn std::fmt::Display| BootError::Cmdline(error.to_string());
    let mut cmdline = Cmdline::try_from(args, layout::CMDLINE_MAX).map_err(|error| failed(&error))?;
    if !platform.acpi {
        for slot in platform.virtio {
            let base = GuestAddress(slot.gpa);
            let gsi = slot.gsi;
            cmdline.add_virtio_mmio_device(slot.len, base, gsi, None).map_err(|error| failed(&error))?;
        }
    }
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &cmdline).map_err(|error| failed(&error))?;
    let text: CString = cmdline.as_cstring().map_err(|error| failed(&error))?;
    Ok(text.as_bytes().len() as u32)
}

fn write_tables(platform: Platform<'_>, ram: &GuestRam) -> Result<(), Error> {
    let write = |what, gpa, table: &[u8]| {
        ram.view().write_slice(table, GuestAddress(gpa)).map_err(|source| BootError::GuestAccess { what, gpa, source })
    };
    write("MP table", layout::MP_TABLE, &mptable::table(platform.vcpu_count))?;
    if platform.acpi {
        write("ACPI tables", layout::RSDP, &acpi::tables(platform))?;
    }
    Ok(())
}
