//! Changes to the devices of a running VM, in the form of the API.

use crate::config::RateLimiterConfig;
use serde::Deserialize;
use std::path::PathBuf;

/// A change to one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DevicePatch {
    Drive(DrivePatch),
    Network(NetworkPatch),
    Balloon(BalloonPatch),
    Pmem(PmemPatch),
}

/// `PATCH /drives/{id}`; absent fields stay.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    pub drive_id: String,
    /// Opens this file instead; the guest is notified of its size.
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// `PATCH /network-interfaces/{id}`; absent fields stay.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkPatch {
    pub iface_id: String,
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// `PATCH /pmem/{id}`; absent fields stay.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    pub id: String,
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// A change to the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonPatch {
    /// Memory that the guest is asked to give up, MiB.
    Amount(u32),
    /// Interval at which it is asked for statistics, s.
    Interval(u16),
    /// Begin a round of free page hinting.
    StartHinting { acknowledge_on_stop: bool },
    /// End the round.
    StopHinting,
}

/// A question about the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonQuestion {
    Config,
    Statistics,
    Hinting,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmountPatch {
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntervalPatch {
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartHintingPatch {
    /// True if the guest gets its pages back as soon as it has named all.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

pub(crate) fn yes() -> bool {
    true
}
