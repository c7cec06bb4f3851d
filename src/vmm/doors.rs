//! Fuzz doors of the machine (`docs/fuzzing.md`): saved state, and kernels to boot.

use crate::config::{BootProtocol, BootSource, TvmmConfig};
use crate::devices::virtio::block::{Block, BlockState, Image};
use crate::devices::virtio::{
    Balloon, BalloonState, Entropy, EntropyState, MmioDevice, Pmem, PmemState, VirtioDevice, VsockParams, id,
};
use crate::devices::{FwCfg, VmGenId};
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::doors::{file_of, resealed, snapshot_of};
use crate::snapshot::{Container, MemoryLayout};

use super::arch::Platform;
use super::boot;
use super::devices::SavedDevice;
use super::error::Error;
use super::saved_state::SavedState;

/// Guest memory of the doors, bytes.
const RAM: u64 = 8 << 20;

/// The state file of a snapshot, with its checksums made right, in a snapshot whose manifest and digests are right.
pub fn saved_state(data: &[u8]) {
    let Ok(container) = Container::parse(resealed(data)) else { return };
    let Ok(sections) = container.copy_sections(|kind| !kind.is_reserved()) else { return };
    let Ok(snapshot) = snapshot_of(&sections) else { return };
    assert!(snapshot.page_map().is_ok(), "a page map that is right is refused");
    let Ok(state) = SavedState::read(&snapshot) else { return };
    let _ = FwCfg::new(state.fw_cfg.clone());
    let _ = state.vmgenid.map(VmGenId::new);
    for vcpu in &state.vcpus {
        let _ = vcpu.cpuid();
        let _ = vcpu.xcr0();
        let _ = vcpu.ahead();
        let _ = vcpu.kernel_written();
        let _ = vcpu.differences(vcpu, &state.vm.pit_vectors());
    }
    let _ = state.vm.differences(&state.vm);
    state.virtio.iter().for_each(|saved| drop(restore(saved)));
}

/// Makes the device again as a restore does, and lets it look at its queues.
fn restore(saved: &SavedDevice) -> Result<(), Error> {
    let Ok((_file, image)) = file_of(&[0; 64 << 10]) else { return Ok(()) };
    let device: Box<dyn VirtioDevice> = match saved.device_type {
        id::ENTROPY => Box::new(Entropy::restore(&saved.decode::<EntropyState>()?)?),
        id::BALLOON => Box::new(Balloon::restore(saved.decode::<BalloonState>()?, Box::new(Keep))?),
        id::BLOCK => Box::new(Block::restore(saved.decode::<BlockState>()?, Image::Instead(&image))?),
        id::PMEM => Box::new(Pmem::restore(saved.decode::<PmemState>()?, Some(&image))?),
        id::VSOCK => return VsockParams::restored(saved.decode()?).map(drop).map_err(Error::from),
        _ => return Ok(()),
    };
    let device = MmioDevice::new(device, crate::devices::virtio::testing::memory())?;
    device.restore(&saved.transport)?;
    device.go_on();
    device.look_at_all();
    device.quiesce();
    device.save()?;
    Ok(())
}

/// Gives no page back.
struct Keep;

impl crate::sys::guest_memory::ReleasePages for Keep {
    fn release(&mut self, pages: crate::snapshot::Extent) -> crate::sys::guest_memory::Outcome {
        crate::sys::guest_memory::Outcome { refused: pages.pages, ..Default::default() }
    }

    fn rewind(&mut self) {}
}

/// A kernel, an ELF file or a bzImage, for all boot protocols. A part of it is the initrd, too.
pub fn kernel(data: &[u8]) {
    let Ok(layout) = MemoryLayout::from_gpa_ranges(&[(0, RAM)]) else { return };
    let Ok((_kernel, kernel)) = file_of(data) else { return };
    let Ok((_initrd, initrd)) = file_of(&data[data.len() / 2..]) else { return };
    let source = BootSource { kernel_image_path: Some(kernel), initrd_path: Some(initrd), boot_args: None };
    for (boot_protocol, acpi) in [(BootProtocol::Linux64, true), (BootProtocol::Pvh, false)] {
        let Ok(ram) = GuestRam::anonymous(&layout) else { return };
        let config = TvmmConfig { boot_protocol, acpi, ..TvmmConfig::default() };
        let _ = boot::load(&source, &config, Platform { vcpu_count: 1, virtio: &[], acpi }, &ram);
    }
}
