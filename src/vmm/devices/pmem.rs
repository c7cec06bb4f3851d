//! Pmem devices: from config to device and back.

use std::any::Any;

use super::limits;
use crate::config::overrides::Overrides;
use crate::config::patch::PmemPatch;
use crate::config::{DeviceConfigs, PmemConfig};
use crate::devices;
use crate::devices::virtio::{Pmem, PmemImage, PmemParams, PmemState, RateLimits, VirtioDevice};
use crate::snapshot::MemoryLayout;
use crate::vmm::arch::layout::pmem_after;

/// Opens the images of a config. The root device comes first, because the kernel command line names it /dev/pmem0.
pub fn open(configs: &DeviceConfigs, layout: &MemoryLayout) -> Result<Vec<Pmem>, devices::Error> {
    let (root, others): (Vec<_>, Vec<_>) = configs.pmem.iter().partition(|config| config.root_device);
    let mut end = ram_end(layout);
    let open = |config: &PmemConfig| {
        let params = PmemParams {
            id: config.id.clone(),
            path: config.path_on_host.clone(),
            read_only: config.read_only,
            is_root: config.root_device,
            gpa: pmem_after(end),
        };
        let pmem = Pmem::new(params, config.rate_limiter.map(RateLimits::from).unwrap_or_default())?;
        end = pmem.params().gpa + pmem.size();
        Ok(pmem)
    };
    root.into_iter().chain(others).map(open).collect()
}

/// Makes a pmem device from its saved state, at its old place. `end`: the end of the memory below, which is moved up.
pub fn restore(state: PmemState, overrides: &Overrides, end: &mut u64) -> Result<Pmem, devices::Error> {
    let gpa = state.params.gpa;
    let size = state.size();
    // Places come from the snapshot file, so they must be such as `open` assigns.
    if gpa != pmem_after(*end) || size == 0 || gpa.checked_add(size).is_none() {
        return Err(devices::Error::State { device: "pmem device", what: "it lies where no pmem device lies" });
    }
    *end = gpa + size;
    let given = overrides.drives.iter().find(|(id, _)| *id == state.params.id);
    Pmem::restore(state, given.map(|(_, path)| path.as_path()))
}

/// The end of RAM.
pub fn ram_end(layout: &MemoryLayout) -> u64 {
    layout.ranges().last().map_or(0, |range| range.gpa + range.len)
}

/// The images to map for `devices`.
pub fn images(devices: &[Box<dyn VirtioDevice>]) -> Vec<PmemImage> {
    let pmem = devices.iter().filter_map(|device| (&**device as &dyn Any).downcast_ref::<Pmem>());
    pmem.map(Pmem::image).collect()
}

/// The kernel command line's arguments for a pmem root device (as in Firecracker); empty if there is none.
pub fn pmem_root_args(configs: &DeviceConfigs) -> &'static str {
    match configs.pmem.iter().find(|config| config.root_device) {
        Some(root) if root.read_only => "root=/dev/pmem0 ro",
        Some(_) => "root=/dev/pmem0 rw",
        None => "",
    }
}

/// The config that `pmem` would be made from.
pub fn config_of(pmem: &Pmem) -> PmemConfig {
    let PmemParams { id, path, read_only, is_root, .. } = pmem.params().clone();
    let rate_limiter = limits::config_of(pmem.limits());
    PmemConfig { id, path_on_host: path, root_device: is_root, read_only, rate_limiter }
}

/// Changes a pmem device. Returns its new config.
pub fn patch(pmem: &mut Pmem, patch: &PmemPatch) -> PmemConfig {
    pmem.change_limits(patch.rate_limiter.map(RateLimits::from).unwrap_or_default());
    config_of(pmem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_args_are_those_of_firecracker() {
        let args = |root_device, read_only| {
            let id = "p".to_owned();
            let path_on_host = "/p".into();
            let pmem = vec![PmemConfig { id, path_on_host, root_device, read_only, rate_limiter: None }];
            pmem_root_args(&DeviceConfigs { pmem, ..DeviceConfigs::default() })
        };
        assert_eq!(args(true, true), "root=/dev/pmem0 ro");
        assert_eq!(args(true, false), "root=/dev/pmem0 rw");
        assert_eq!(args(false, false), "");
    }
}
