//! The children that a fork asks for, with the number of each in its names.

use std::path::{Path, PathBuf};

use super::load::{LoadBody, LoadFields};
use crate::config::error::ConfigError;
use crate::config::fork::{ForkRequest, MAX_CHILDREN};
use crate::config::overrides::{NoSuchDevice, VsockOverrideBody};
use crate::config::restore::RestoreOptions;
use crate::config::{DeviceConfigs, DriveConfig};
use crate::snapshot::{Policy, Verify};

/// The reason for refusing a fork.
#[derive(Debug, thiserror::Error)]
pub enum InvalidFork {
    #[error("Cannot fork the VM into {0} VMs. Ask for 1 to {MAX_CHILDREN}")]
    Count(u32),
    #[error(
        "Cannot fork the VM: all children would have `{text}` of {}. Put {{n}}, the number of the child, into it",
        named(key)
    )]
    SameForAll { key: &'static str, text: String },
    #[error(
        "Cannot fork the VM: {text} exists, and is to be made for a child ({}). Remove it, or give another name",
        named(key)
    )]
    Exists { key: &'static str, text: String },
    #[error(
        "Cannot fork the VM: each child needs a vsock socket of its own. Give --vsock 'PATH-{{n}}' (`vsock_override`)"
    )]
    NoVsock,
    #[error(
        "Cannot fork the VM: each child needs a tap of its own for interface {id}. Give --net '{id}=TAP{{n}}' \
         (`network_overrides`)"
    )]
    NoTap { id: String },
    #[error(
        "Cannot fork the VM: the guest can write the pmem image {id}. Give each child its own with --drive \
         '{id}=PATH-{{n}}' (`drive_overrides`)"
    )]
    SharedPmem { id: String },
    #[error(
        "Cannot fork the VM: its memory is to be copied to {text}, which is no directory. Name one by --dir (`dir`)"
    )]
    NoDir { text: String },
    #[error("Cannot fork the VM: {0}")]
    Override(#[from] NoSuchDevice),
    #[error("Cannot fork the VM: {0}")]
    Load(#[from] ConfigError),
}

/// The flag of `tvmm fork` and the key of the API, of the same setting.
fn named(key: &str) -> String {
    let flag = match key {
        "network_overrides" | "mac_overrides" => "net",
        "drive_overrides" => "drive",
        "vsock_override" => "vsock",
        key => key,
    };
    format!("--{} (`{key}`)", flag.replace('_', "-"))
}

/// One child of a fork, with its number in all names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// From 1 on.
    pub number: u32,
    pub socket: PathBuf,
    pub log: Option<PathBuf>,
    /// Its restore, without the snapshot.
    pub load: LoadFields,
}

impl ForkRequest {
    /// Checks the request for a machine with these devices, and returns the children.
    ///
    /// # Errors
    /// The number of children; devices that they would share; names that exist, or that all children would have.
    pub fn children(&self, devices: &DeviceConfigs) -> Result<Vec<ChildSpec>, InvalidFork> {
        if !(1..=MAX_CHILDREN).contains(&self.count) {
            return Err(InvalidFork::Count(self.count));
        }
        self.check_names(devices)?;
        self.check_devices(devices)?;
        let children: Vec<ChildSpec> = (1..=self.count).map(|number| self.child(number)).collect();
        for child in &children {
            let request = LoadBody::new(child.load.clone()).check()?;
            request.overrides.check(devices)?;
            let vsock = child.load.vsock_override.as_ref().map(|vsock| &vsock.uds_path);
            for (key, path) in [("out_sock", Some(&child.socket)), ("vsock_override", vsock)] {
                if let Some(path) = path.filter(|path| path.symlink_metadata().is_ok()) {
                    return Err(InvalidFork::Exists { key, text: path.display().to_string() });
                }
            }
        }
        let dir = self.fork_dir();
        if !dir.is_dir() {
            return Err(InvalidFork::NoDir { text: dir.display().to_string() });
        }
        Ok(children)
    }

    /// The directory in which the fork point is made.
    pub fn fork_dir(&self) -> PathBuf {
        let socket = numbered_path(&self.out_sock, 1);
        match (&self.dir, socket.parent()) {
            (Some(dir), _) => dir.clone(),
            (None, Some(parent)) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            (None, _) => PathBuf::from("."),
        }
    }

    /// Returns whether the children get copies of drives.
    pub fn copies_drives(&self, devices: &DeviceConfigs) -> bool {
        devices.drives.iter().any(|drive| self.is_copied(drive))
    }

    fn is_copied(&self, drive: &DriveConfig) -> bool {
        !drive.is_read_only && !self.has_image(&drive.drive_id)
    }

    fn has_image(&self, id: &str) -> bool {
        self.drive_overrides.iter().any(|drive| drive.drive_id == id)
    }

    /// Refuses names of things that belong to one child alone, if all children would have them.
    fn check_names(&self, devices: &DeviceConfigs) -> Result<(), InvalidFork> {
        let shown = |path: &Path| path.display().to_string();
        let is_written = |id: &str| {
            devices.drives.iter().any(|drive| drive.drive_id == id && !drive.is_read_only)
                || devices.pmem.iter().any(|pmem| pmem.id == id && !pmem.read_only)
        };
        let mut names = vec![("out_sock", shown(&self.out_sock))];
        names.extend(self.log.iter().map(|path| ("log", shown(path))));
        names.extend(self.drive_dir.iter().map(|path| ("drive_dir", shown(path))));
        names.extend(self.vsock_override.iter().map(|vsock| ("vsock_override", shown(&vsock.uds_path))));
        names.extend(self.network_overrides.iter().map(|network| ("network_overrides", network.host_dev_name.clone())));
        names.extend(self.mac_overrides.iter().map(|mac| ("mac_overrides", mac.guest_mac.clone())));
        let written = self.drive_overrides.iter().filter(|drive| is_written(&drive.drive_id));
        names.extend(written.map(|drive| ("drive_overrides", shown(&drive.path_on_host))));
        match names.into_iter().find(|(_, text)| self.count > 1 && numbered(text, 1) == *text) {
            Some((key, text)) => Err(InvalidFork::SameForAll { key, text }),
            None => Ok(()),
        }
    }

    /// Refuses devices that a child would share with its parent.
    fn check_devices(&self, devices: &DeviceConfigs) -> Result<(), InvalidFork> {
        if devices.vsock.is_some() && self.vsock_override.is_none() {
            return Err(InvalidFork::NoVsock);
        }
        let has_tap = |id: &str| self.network_overrides.iter().any(|network| network.iface_id == id);
        if let Some(network) = devices.network_interfaces.iter().find(|network| !has_tap(&network.iface_id)) {
            return Err(InvalidFork::NoTap { id: network.iface_id.clone() });
        }
        match devices.pmem.iter().find(|pmem| !pmem.read_only && !self.has_image(&pmem.id)) {
            Some(pmem) => Err(InvalidFork::SharedPmem { id: pmem.id.clone() }),
            None => Ok(()),
        }
    }

    fn child(&self, number: u32) -> ChildSpec {
        let text = |text: &String| numbered(text, number);
        let path = |path: &PathBuf| numbered_path(path, number);
        let options = RestoreOptions {
            // Maps the memory file private, so that children share its pages until they write them.
            policy: Some(Policy::Firecracker),
            // The bytes were written a moment ago, and are still in the page cache.
            verify: Some(Verify::Off),
            drive_overrides: self.drive_overrides.clone(),
            drive_dir: self.drive_dir.as_ref().map(path),
            mac_overrides: self.mac_overrides.clone(),
            metadata: self.metadata.iter().map(|(key, value)| (key.clone(), text(value))).collect(),
            ..RestoreOptions::default()
        };
        let mut load = LoadFields {
            snapshot_path: PathBuf::from("."),
            network_overrides: self.network_overrides.clone(),
            vsock_override: self
                .vsock_override
                .as_ref()
                .map(|vsock| VsockOverrideBody { uds_path: path(&vsock.uds_path) }),
            tvmm: options,
            ..LoadFields::default()
        };
        load.network_overrides.iter_mut().for_each(|network| network.host_dev_name = text(&network.host_dev_name));
        load.tvmm.drive_overrides.iter_mut().for_each(|drive| drive.path_on_host = path(&drive.path_on_host));
        load.tvmm.mac_overrides.iter_mut().for_each(|mac| mac.guest_mac = text(&mac.guest_mac));
        ChildSpec { number, socket: path(&self.out_sock), log: self.log.as_ref().map(path), load }
    }
}

fn numbered(text: &str, number: u32) -> String {
    text.replace("{n}", &number.to_string()).replace("{n:02x}", &format!("{number:02x}"))
}

/// The path with a child's number in it. A request is JSON, so its paths are UTF-8.
fn numbered_path(path: &Path, number: u32) -> PathBuf {
    PathBuf::from(numbered(&path.to_string_lossy(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: serde_json::Value) -> ForkRequest {
        serde_json::from_value(json).unwrap()
    }

    fn refusal(json: serde_json::Value, devices: serde_json::Value) -> String {
        let drives = serde_json::from_value(devices["drives"].clone()).unwrap_or_default();
        let pmem = serde_json::from_value(devices["pmem"].clone()).unwrap_or_default();
        let network_interfaces = serde_json::from_value(devices["network-interfaces"].clone()).unwrap_or_default();
        let vsock = serde_json::from_value(devices["vsock"].clone()).unwrap();
        let devices = DeviceConfigs { drives, pmem, network_interfaces, vsock, ..DeviceConfigs::default() };
        request(json).children(&devices).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn names_have_the_number_of_the_child() {
        let dir = tempfile::tempdir().unwrap();
        let request = request(serde_json::json!({
            "count": 17, "out_sock": dir.path().join("vm-{n}.sock"), "metadata": { "name": "child {n}" },
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap{n}" }],
            "mac_overrides": [{ "iface_id": "eth0", "guest_mac": "06:00:00:00:00:{n:02x}" }],
        }));
        assert_eq!(request.fork_dir(), dir.path());
        let child = request.child(17);
        assert_eq!(child.socket, dir.path().join("vm-17.sock"));
        assert_eq!(child.load.tvmm.metadata["name"], "child 17");
        assert_eq!(child.load.network_overrides[0].host_dev_name, "tap17");
        assert_eq!(child.load.tvmm.mac_overrides[0].guest_mac, "06:00:00:00:00:11");
    }

    #[test]
    fn a_fork_whose_children_would_share_something_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm-{n}.sock");
        let none = || serde_json::json!({});
        for count in [0, MAX_CHILDREN + 1] {
            let text = refusal(serde_json::json!({ "count": count, "out_sock": socket }), none());
            assert_eq!(text, format!("Cannot fork the VM into {count} VMs. Ask for 1 to {MAX_CHILDREN}"));
        }
        let text = refusal(serde_json::json!({ "count": 2, "out_sock": "vm.sock" }), none());
        assert!(text.contains("all children would have `vm.sock` of --out-sock (`out_sock`)"), "{text}");
        let net = serde_json::json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]);
        let shared = serde_json::json!({ "count": 2, "out_sock": socket, "network_overrides": net });
        assert!(refusal(shared, none()).contains("`tap0` of --net (`network_overrides`)"));
        std::fs::write(dir.path().join("vm-2.sock"), "").unwrap();
        let text = refusal(serde_json::json!({ "count": 2, "out_sock": socket }), none());
        assert!(text.contains("vm-2.sock exists"), "{text}");
        let one = |more: serde_json::Value| {
            let mut json = serde_json::json!({ "count": 1, "out_sock": socket });
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json
        };
        let vsock = serde_json::json!({ "vsock": { "guest_cid": 3, "uds_path": "v" } });
        assert!(refusal(one(none()), vsock).contains("needs a vsock socket"));
        let network = serde_json::json!({ "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap0" }] });
        assert!(refusal(one(none()), network).contains("needs a tap of its own for interface eth0"));
        let pmem = serde_json::json!({ "pmem": [{ "id": "p", "path_on_host": "x" }] });
        assert!(refusal(one(none()), pmem).contains("the guest can write the pmem image p"));
        let drive = serde_json::json!({ "drive_overrides": [{ "drive_id": "d", "path_on_host": "x" }] });
        assert!(refusal(one(drive), none()).contains("The snapshot has no drive `d` to override"));
        let nowhere = serde_json::json!({ "dir": dir.path().join("missing") });
        assert!(refusal(one(nowhere), none()).contains("which is no directory"));
    }
}
