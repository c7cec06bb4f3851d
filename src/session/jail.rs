//! The files of the host that a session uses: those that a jail lets in before the session begins, and the check of
//! those that requests name later.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::sources::location;
use crate::backends::pool_media;
use crate::config::patch::DevicePatch;
use crate::config::refusal::Refused;
use crate::config::request::{Command, SnapshotPaths};
use crate::config::restore::{MemoryFrom, PlanFrom, RestoreRequest};
use crate::config::{BootSource, DeviceConfig, DeviceConfigs, DriveConfig, PmemConfig, VmConfig};
use crate::session::Error;
use crate::snapshot::{
    Chain, Cold, ColdSpec, KeySource, Location, TrustedKeys, append_private, create_private_dir, overwrite_private,
};
use crate::sys::jail::{self, Error as JailError, JailPath, Use};
use crate::sys::secret_key;
use crate::tiering::costs::Costs;
use crate::vmm::devices::host_places;

/// Files by which names of other hosts are found, and certificates of theirs checked.
const NETWORK_FILES: [&str; 6] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/pki", "/usr/share/ca-certificates"];
/// Read-ahead of the devices that snapshots lie on (`sys/page_cache.rs`).
const READAHEAD_FILES: [&str; 2] = ["/sys/class/bdi", "/sys/devices/virtual/bdi"];
/// The kind of paging below KVM (`vmm/host.rs`).
const PAGING_FILES: [&str; 2] = ["/sys/module/kvm_intel/parameters", "/sys/module/kvm_amd/parameters"];
/// The boot that a lease of a pool is of.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The parts of its host that a session uses.
#[derive(Debug, Default)]
pub struct Needs {
    /// Files and directories.
    pub paths: Vec<JailPath>,
    /// Taps.
    pub taps: Vec<String>,
    /// The reason why other hosts must be reached.
    pub network: Option<&'static str>,
}

impl Needs {
    /// Lists the needs of a session that begins with `config`, and restores `load` if there is one.
    ///
    /// # Errors
    /// A snapshot or a pool that cannot be opened.
    pub fn of(config: &VmConfig, load: Option<&RestoreRequest>) -> Result<Needs, Error> {
        let mut needs = Needs::default();
        needs.read(PAGING_FILES);
        needs.read(READAHEAD_FILES);
        // Made now: in the jail only the file is there, and not its directory.
        if let Some(metrics) = &config.metrics {
            needs.append_to(&metrics.metrics_path)?;
        }
        needs.boot_source(&config.boot_source);
        needs.devices(&config.devices);
        if let Some(load) = load {
            needs.request(load)?;
            needs.restored(load)?;
        }
        Ok(needs)
    }

    /// Adds a path.
    pub fn add(&mut self, path: impl Into<PathBuf>, allowed: Use) {
        self.paths.push(JailPath::new(path, allowed));
    }

    fn read<P: Into<PathBuf>>(&mut self, paths: impl IntoIterator<Item = P>) {
        paths.into_iter().for_each(|path| self.add(path, Use::Read));
    }

    /// Adds the directory of a socket to be made at `path`.
    pub fn socket(&mut self, path: &Path) {
        self.add(jail::absolute(path).parent().unwrap_or(Path::new("/")), Use::Sockets);
    }

    /// Adds a file that is written anew. It is made empty.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn overwrite(&mut self, path: &Path) -> Result<(), Error> {
        overwrite_private(path).map_err(|source| Error::File { doing: "write", path: path.into(), source })?;
        self.add(path, Use::Write);
        Ok(())
    }

    fn append_to(&mut self, path: &Path) -> Result<(), Error> {
        append_private(path)?;
        self.add(path, Use::Write);
        Ok(())
    }

    /// Adds a directory that is made if it does not exist.
    fn directory(&mut self, path: &Path) -> Result<(), Error> {
        create_private_dir(path).map_err(|source| Error::File { doing: "make", path: path.into(), source })?;
        self.add(path, Use::Write);
        Ok(())
    }

    fn boot_source(&mut self, source: &BootSource) {
        self.read(source.kernel_image_path.iter().chain(&source.initrd_path).cloned());
    }

    fn drive(&mut self, drive: &DriveConfig) {
        self.add(&drive.path_on_host, if drive.is_read_only { Use::Read } else { Use::Write });
    }

    fn pmem(&mut self, pmem: &PmemConfig) {
        self.add(&pmem.path_on_host, if pmem.read_only { Use::Read } else { Use::Write });
    }

    fn devices(&mut self, devices: &DeviceConfigs) {
        devices.drives.iter().for_each(|drive| self.drive(drive));
        devices.pmem.iter().for_each(|pmem| self.pmem(pmem));
        self.taps.extend(devices.network_interfaces.iter().map(|network| network.host_dev_name.clone()));
        if let Some(vsock) = &devices.vsock {
            self.socket(&vsock.uds_path);
        }
    }

    /// Adds what a restore request itself names.
    fn request(&mut self, load: &RestoreRequest) -> Result<(), Error> {
        self.location(&location(&paths_of(load)));
        match &load.memory {
            MemoryFrom::Files { trusted_keys, .. } => self.read(trusted_keys.clone()),
            MemoryFrom::Handler(socket) => self.add(socket, Use::Write),
            MemoryFrom::Cold(cold) => self.cold(cold)?,
            MemoryFrom::Pools { pools, fallback } => {
                self.read([BOOT_ID]);
                for pool in pools {
                    for file in pool_media::files(pool)? {
                        self.add(file.path, if file.is_written { Use::Write } else { Use::Read });
                    }
                }
                fallback.as_ref().map_or(Ok(()), |cold| self.cold(cold))?;
            }
        }
        match &load.plan {
            PlanFrom::File(plan) => self.add(plan, Use::Read),
            PlanFrom::Policy(choice) => {
                self.read(choice.profile.iter().chain(&choice.costs).cloned());
                self.read(Costs::default_path());
            }
        }
        load.plan_dir.as_deref().map_or(Ok(()), |dir| self.directory(dir))?;
        let overrides = &load.overrides;
        overrides.drives.iter().for_each(|(_, image)| self.add(image, Use::Write));
        if let Some(dir) = &overrides.drive_dir {
            self.add(dir, Use::Write);
        }
        if let Some(vsock) = &overrides.vsock {
            self.socket(vsock);
        }
        self.taps.extend(overrides.networks.iter().filter_map(|network| network.host_dev_name.clone()));
        Ok(())
    }

    /// Adds what the snapshot of a restore names: its parents, and the places of its devices.
    fn restored(&mut self, load: &RestoreRequest) -> Result<(), Error> {
        let place = location(&paths_of(load));
        let chain = match &load.memory {
            MemoryFrom::Files { trusted_keys, .. } if trusted_keys.is_empty() => Chain::open(&place)?,
            // Nothing of an unsigned snapshot is parsed here either.
            MemoryFrom::Files { trusted_keys, .. } => Chain::open_signed(&place, &TrustedKeys::read(trusted_keys)?)?,
            MemoryFrom::Handler(_) => Chain::open_without_memory(&load.snapshot)?,
            MemoryFrom::Cold(cold) => {
                let key = cold.key.as_ref().map(secret_key::read).transpose()?;
                Chain::open_elsewhere(&place, key.as_ref())?
            }
            MemoryFrom::Pools { .. } => Chain::open_pooled(&place)?,
        };
        chain.layers().iter().for_each(|layer| self.location(layer.location()));
        let places = host_places(chain.tip(), &load.overrides)?;
        self.read(places.read_only);
        places.writable.into_iter().for_each(|image| self.add(image, Use::Write));
        if let Some(vsock) = &places.vsock {
            self.socket(vsock);
        }
        self.taps.extend(places.taps);
        Ok(())
    }

    fn location(&mut self, location: &Location) {
        match location {
            Location::Dir(dir) => self.add(dir, Use::Read),
            Location::Files { snapshot, memory } => self.read([snapshot, memory]),
        }
    }

    fn cold(&mut self, cold: &Cold) -> Result<(), Error> {
        for pool in &cold.pools {
            match pool {
                ColdSpec::Dir(dir) | ColdSpec::Direct(dir, _) => self.add(dir, Use::Read),
                ColdSpec::Tcp(_) | ColdSpec::Rdma(_) | ColdSpec::Object(_) => {
                    self.network = Some("a cold pool is on another host");
                    self.read(NETWORK_FILES);
                }
            }
        }
        match &cold.key {
            Some(KeySource::File(key)) => self.add(key, Use::Read),
            Some(KeySource::Command(_)) => return Err(JailError::KeyCommand.into()),
            None => {}
        }
        cold.cache.as_ref().map_or(Ok(()), |cache| self.directory(&cache.dir))
    }

    /// Refuses directories for sockets that every user may write, and the root: the VM could remove the sockets of
    /// others there.
    ///
    /// # Errors
    /// [`JailError::SharedDirectory`].
    pub fn check(&self) -> Result<(), Error> {
        for entry in self.paths.iter().filter(|entry| entry.allowed == Use::Sockets) {
            let is_shared = |path: &Path| fs::metadata(path).is_ok_and(|facts| facts.permissions().mode() & 0o002 != 0);
            if entry.path == Path::new("/") || is_shared(&entry.path) {
                return Err(JailError::SharedDirectory { path: entry.path.clone() }.into());
            }
        }
        Ok(())
    }

    /// Gives the files that were just made to the user that the VM will run as.
    ///
    /// # Errors
    /// One that cannot be given.
    pub fn give_new_files(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(), Error> {
        if uid.is_none() && gid.is_none() {
            return Ok(());
        }
        for JailPath { path, allowed } in &self.paths {
            // Anything else of a size or with contents is not new.
            let is_new = *allowed == Use::Write
                && fs::metadata(path).is_ok_and(|facts| {
                    let is_empty =
                        if facts.is_dir() { is_empty_dir(path) } else { facts.is_file() && facts.len() == 0 };
                    is_empty && facts.uid() == rustix::process::geteuid().as_raw()
                });
            if is_new {
                std::os::unix::fs::chown(path, uid, gid.or(uid)).map_err(|source| Error::File {
                    doing: "give away",
                    path: path.clone(),
                    source,
                })?;
            }
        }
        Ok(())
    }
}

fn is_empty_dir(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

fn paths_of(load: &RestoreRequest) -> SnapshotPaths {
    SnapshotPaths { snapshot: load.snapshot.clone(), memory: load.memory_file().map(Into::into) }
}

/// Refuses a command that names a file outside the jail of this process, or that no jail allows.
///
/// # Errors
/// The file, and how to let it in.
pub fn check(command: &Command) -> Result<(), Refused> {
    let Some(jail) = jail::in_force() else { return Ok(()) };
    let mut needs = Needs::default();
    let refused = |error: Error| Refused::bad_request_because(&error);
    match command {
        Command::PutBootSource(source) => needs.boot_source(source),
        Command::PutDevice(DeviceConfig::Drive(drive)) => needs.drive(drive),
        Command::PutDevice(DeviceConfig::Pmem(pmem)) => needs.pmem(pmem),
        Command::PutDevice(DeviceConfig::Vsock(vsock)) => needs.socket(&vsock.uds_path),
        Command::PatchDevice(DevicePatch::Drive(patch)) => needs.read(patch.path_on_host.iter().cloned()),
        Command::PutLogger(logger) => logger.log_path.iter().for_each(|path| needs.add(path, Use::Write)),
        Command::PutMetrics(metrics) => needs.add(&metrics.metrics_path, Use::Write),
        Command::CreateSnapshot(create) => {
            let SnapshotPaths { snapshot, memory } = &create.location;
            [Some(snapshot), memory.as_ref()].into_iter().flatten().for_each(|path| needs.add(path, Use::Write));
        }
        Command::Demote(demote) => demote.spill_dir.iter().for_each(|dir| needs.add(dir, Use::Write)),
        Command::LoadSnapshot(load) => needs.request(load).map_err(refused)?,
        Command::Repurpose(request) => needs.request(&request.load).map_err(refused)?,
        Command::Fork(_) => {
            return Err(Refused::bad_request(
                "Cannot fork the VM: it is jailed, and a jail starts no programs. Take a snapshot and restore it, or \
                 start the VM without --jail.",
            ));
        }
        _ => return Ok(()),
    }
    let is_optional = |entry: &JailPath| !entry.path.starts_with("/proc") && !entry.path.starts_with("/sys");
    let outside = needs.paths.iter().filter(|entry| is_optional(entry)).find(|e| !jail.allows(&e.path, e.allowed));
    match outside {
        Some(JailPath { path, .. }) if Costs::default_path().as_ref() == Some(path) => Ok(()),
        Some(JailPath { path, allowed }) => {
            let suffix = if *allowed == Use::Read { "" } else { ":rw" };
            let path = jail::absolute(path);
            Err(Refused::bad_request(format!(
                "Cannot use {path}: it is outside the jail of this VM. Start tvmm with --jail-path {path}{suffix}, or \
                 that of a directory above it.",
                path = path.display()
            )))
        }
        None => Ok(()),
    }
}
