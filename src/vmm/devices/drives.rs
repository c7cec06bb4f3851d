//! Drives: from config to device and back.

use std::fs::File;
use std::sync::Arc;

use super::limits;
use super::virtio_devices::VirtioDevices;
use crate::config::overrides::Overrides;
use crate::config::patch::DrivePatch;
use crate::config::{CacheType, DeviceConfigs, DriveConfig, IoEngine};
use crate::devices;
use crate::devices::virtio::RateLimits;
use crate::devices::virtio::block::{Block, BlockParams, BlockState, Engine, Image};

/// A drive that the guest can write, with the facts that saving it needs.
pub struct WritableDrive {
    pub id: String,
    pub image: Arc<File>,
    /// Size that the guest sees.
    pub bytes: u64,
}

/// Opens the drives of a config. The root device comes first, because the kernel command line names it /dev/vda.
pub fn open(configs: &DeviceConfigs) -> Result<Vec<Block>, devices::Error> {
    let (root, others): (Vec<_>, Vec<_>) = configs.drives.iter().partition(|drive| drive.is_root_device);
    let open = |config: &DriveConfig| Block::new(params(config), limits_of(config));
    root.into_iter().chain(others).map(open).collect()
}

/// Makes a drive from its saved state.
pub fn restore(state: BlockState, overrides: &Overrides) -> Result<Block, devices::Error> {
    let image = image_of(&state, overrides);
    Block::restore(state, image)
}

/// Checks that [`restore`] can open the image, and changes nothing. `held`: see [`Block::check`].
pub fn check(state: &BlockState, overrides: &Overrides, held: &[Arc<File>]) -> Result<(), devices::Error> {
    Block::check(state, image_of(state, overrides), held)
}

/// The image of a restored drive.
fn image_of<'a>(state: &BlockState, overrides: &'a Overrides) -> Image<'a> {
    let given = overrides.drives.iter().find(|(id, _)| *id == state.params.id);
    given.map_or(Image::Own, |(_, path)| Image::Instead(path))
}

/// The kernel command line's arguments for the root device (as in Firecracker); empty if there is none.
pub fn root_args(configs: &DeviceConfigs) -> String {
    let Some(root) = configs.drives.iter().find(|drive| drive.is_root_device) else { return String::new() };
    let mode = if root.is_read_only { "ro" } else { "rw" };
    match &root.partuuid {
        Some(partuuid) => format!("root=PARTUUID={partuuid} {mode}"),
        None => format!("root=/dev/vda {mode}"),
    }
}

fn params(config: &DriveConfig) -> BlockParams {
    BlockParams {
        id: config.drive_id.clone(),
        path: config.path_on_host.clone(),
        read_only: config.is_read_only,
        writeback: config.cache_type == CacheType::Writeback,
        engine: match config.io_engine {
            IoEngine::Sync => Engine::Sync,
            IoEngine::Async => Engine::Async,
        },
        is_root: config.is_root_device,
        partuuid: config.partuuid.clone(),
    }
}

fn limits_of(config: &DriveConfig) -> RateLimits {
    config.rate_limiter.map(RateLimits::from).unwrap_or_default()
}

/// The config that `block` would be made from.
pub fn config_of(block: &Block) -> DriveConfig {
    let BlockParams { id, path, read_only, writeback, engine, is_root, partuuid } = block.params().clone();
    DriveConfig {
        drive_id: id,
        is_root_device: is_root,
        path_on_host: path,
        is_read_only: read_only,
        partuuid,
        cache_type: if writeback { CacheType::Writeback } else { CacheType::Unsafe },
        io_engine: match engine {
            Engine::Sync => IoEngine::Sync,
            Engine::Async => IoEngine::Async,
        },
        rate_limiter: limits::config_of(block.limits()),
    }
}

/// Changes a drive. Returns its new config, and whether the guest must be told.
pub fn patch(block: &mut Block, patch: &DrivePatch) -> (Result<DriveConfig, devices::Error>, bool) {
    if let Some(path) = &patch.path_on_host
        && let Err(error) = block.change_image(path)
    {
        return (Err(error), false);
    }
    if let Some(limits) = patch.rate_limiter {
        block.change_limits(limits.into());
    }
    (Ok(config_of(block)), patch.path_on_host.is_some())
}

impl VirtioDevices {
    /// The open images of all drives.
    pub fn images(&self) -> Vec<Arc<File>> {
        let image =
            |config: &DriveConfig| self.with(&config.drive_id, |block: &mut Block| (block.image().clone(), false));
        self.configs.drives.iter().filter_map(image).collect()
    }

    /// The drives that the guest can write.
    pub fn writable_drives(&self) -> Vec<WritableDrive> {
        let drive = |config: &DriveConfig| {
            self.with(&config.drive_id, |block: &mut Block| {
                let id = config.drive_id.clone();
                let image = block.image().clone();
                (WritableDrive { id, image, bytes: block.bytes() }, false)
            })
        };
        self.configs.drives.iter().filter(|config| !config.is_read_only).filter_map(drive).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_args_are_those_of_firecracker() {
        let drive = |root, read_only, partuuid: Option<&str>| DriveConfig {
            drive_id: "d".into(),
            is_root_device: root,
            path_on_host: "/d".into(),
            is_read_only: read_only,
            partuuid: partuuid.map(str::to_owned),
            cache_type: CacheType::Unsafe,
            io_engine: IoEngine::Sync,
            rate_limiter: None,
        };
        let args = |drive| root_args(&DeviceConfigs { drives: vec![drive], ..DeviceConfigs::default() });
        assert_eq!(args(drive(true, false, None)), "root=/dev/vda rw");
        assert_eq!(args(drive(true, true, Some("0eaa91a0-01"))), "root=PARTUUID=0eaa91a0-01 ro");
        assert_eq!(args(drive(false, true, Some("0eaa91a0-01"))), "");
    }
}
