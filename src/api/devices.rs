//! Requests about devices: bodies with an id are checked against the id in the path.

use serde::de::DeserializeOwned;

use super::fault::Fault;
use super::requests::{Parsed, json};
use crate::config::patch::{
    AmountPatch, BalloonPatch, DevicePatch, DrivePatch, IntervalPatch, NetworkPatch, PmemPatch, StartHintingPatch,
};
use crate::config::request::Command;
use crate::config::{DeviceConfig, DeviceConfigs, DriveConfig, EntropyConfig, NetworkConfig, PmemConfig, VsockConfig};

/// Turns the id in a path and a body into a command.
pub(super) type ParseAt = fn(&str, &[u8]) -> Result<Parsed, Fault>;

/// A command that puts one device. Values that no machine could have are refused here already.
fn put(device: DeviceConfig) -> Result<Parsed, Fault> {
    DeviceConfigs::default().put(device.clone())?;
    Ok(Command::PutDevice(device).into())
}

/// Firecracker's sentence.
fn same_id<'a>(path: &str, body: &'a str, kind: &str) -> Result<&'a str, Fault> {
    if path == body {
        return Ok(body);
    }
    Err(Fault::bad_request(format!(
        "The {kind} id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

fn at<T: DeserializeOwned>(path: &str, body: &[u8], kind: &str, id: fn(&T) -> &str) -> Result<T, Fault> {
    let value: T = json(body)?;
    same_id(path, id(&value), kind)?;
    Ok(value)
}

pub(super) fn put_drive(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    put(DeviceConfig::Drive(at(path, body, "drive", |drive: &DriveConfig| &drive.drive_id)?))
}

pub(super) fn patch_drive(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    let patch = at(path, body, "drive", |patch: &DrivePatch| &patch.drive_id)?;
    Ok(Command::PatchDevice(DevicePatch::Drive(patch)).into())
}

pub(super) fn put_network(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    put(DeviceConfig::Network(at(path, body, "iface", |network: &NetworkConfig| &network.iface_id)?))
}

pub(super) fn patch_network(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    let patch = at(path, body, "iface", |patch: &NetworkPatch| &patch.iface_id)?;
    Ok(Command::PatchDevice(DevicePatch::Network(patch)).into())
}

pub(super) fn put_pmem(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    put(DeviceConfig::Pmem(at(path, body, "pmem", |pmem: &PmemConfig| &pmem.id)?))
}

pub(super) fn put_vsock(body: &[u8]) -> Result<Parsed, Fault> {
    let vsock: VsockConfig = json(body)?;
    let is_deprecated = vsock.vsock_id.is_some();
    Ok(Parsed { is_deprecated, ..put(DeviceConfig::Vsock(vsock))? })
}

pub(super) fn put_entropy(body: &[u8]) -> Result<Parsed, Fault> {
    put(DeviceConfig::Entropy(json::<EntropyConfig>(body)?))
}

pub(super) fn put_balloon(body: &[u8]) -> Result<Parsed, Fault> {
    put(DeviceConfig::Balloon(json(body)?))
}

pub(super) fn patch_pmem(path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    let patch = at(path, body, "pmem", |patch: &PmemPatch| &patch.id)?;
    Ok(Command::PatchDevice(DevicePatch::Pmem(patch)).into())
}

fn change_balloon(patch: BalloonPatch) -> Parsed {
    Command::PatchDevice(DevicePatch::Balloon(patch)).into()
}

pub(super) fn patch_balloon(body: &[u8]) -> Result<Parsed, Fault> {
    let AmountPatch { amount_mib } = json(body)?;
    Ok(change_balloon(BalloonPatch::Amount(amount_mib)))
}

pub(super) fn patch_balloon_statistics(body: &[u8]) -> Result<Parsed, Fault> {
    let IntervalPatch { stats_polling_interval_s } = json(body)?;
    Ok(change_balloon(BalloonPatch::Interval(stats_polling_interval_s)))
}

/// Starts hinting. The body may be left out.
pub(super) fn start_hinting(body: &[u8]) -> Result<Parsed, Fault> {
    let StartHintingPatch { acknowledge_on_stop } = json(if body.is_empty() { b"{}" } else { body })?;
    Ok(change_balloon(BalloonPatch::StartHinting { acknowledge_on_stop }))
}

/// Stops hinting. There is no body.
pub(super) fn stop_hinting(body: &[u8]) -> Result<Parsed, Fault> {
    match body {
        b"" | b"{}" => Ok(change_balloon(BalloonPatch::StopHinting)),
        _ => Err(Fault::bad_request("PATCH /balloon/hinting/stop takes no body.")),
    }
}
