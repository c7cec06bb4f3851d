//! The network device (VIRTIO 1.2, 5.1): a tap of the host as the guest's network card.
//!
//! ```text
//!  tap readable ─► receive: readv straight into the driver's buffers ─► used ring, interrupt
//!  transmit kick ─► transmit: writev straight from the driver's buffers ─► tap
//! ```
//!
//! Frames keep the virtio-net header all the way, so that the last hop does checksums and segmentation. Frames that the
//! tap holds when a snapshot is taken stay with the tap.

mod control;
mod frame;
mod link;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::os::fd::AsRawFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::{Broken, Io, RateLimiter, RateLimiterState, RateLimits, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::devices::virtio::device::decode;

use link::Link;
use receive::{RX, Receiver};
use tap::Tap;
use transmit::{TX, Transmitter};

const QUEUE_SIZES: [u16; 3] = [receive::QUEUE_SIZE, 256, 16];

/// Sources of the device's own.
mod token {
    pub const TAP: u32 = 0;
    pub const RX_TIMER: u32 = 1;
    pub const TX_TIMER: u32 = 2;
    pub const AGAIN: u32 = 3;
}

/// The parameters of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetParams {
    pub id: String,
    /// The name of the tap.
    pub tap: String,
    /// The guest's address; without one the guest chooses it.
    pub mac: Option<[u8; 6]>,
    /// The MTU of the network that the guest is given.
    pub mtu: Option<u16>,
    pub rx_limits: RateLimits,
    pub tx_limits: RateLimits,
}

/// Settings that a restored interface has instead of its old ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetOverride {
    pub tap: Option<String>,
    pub mac: Option<[u8; 6]>,
}

/// A network interface, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    id: String,
    tap: String,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    rx_limiter: RateLimiterState,
    tx_limiter: RateLimiterState,
}

impl NetState {
    /// The tap that it had.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// The id of the interface.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A network interface.
pub struct Net {
    params: NetParams,
    link: Link,
    rx: Receiver,
    tx: Transmitter,
    /// The driver shall announce its address to the network (VIRTIO 1.2, 5.1.6.5.4).
    announce: bool,
    restored: bool,
}

impl Net {
    /// Opens the tap.
    pub fn new(params: NetParams) -> Result<Self, Error> {
        let rx = RateLimiter::new(params.rx_limits)?;
        let tx = RateLimiter::new(params.tx_limits)?;
        let tap = Tap::open(&params.id, &params.tap)?;
        Net::with_tap(params, tap, rx, tx)
    }

    /// Makes an interface again, with the settings of `overrides` for its id.
    pub fn restore(state: NetState, overrides: impl FnOnce(&str) -> NetOverride) -> Result<Self, Error> {
        let overrides = overrides(&state.id);
        if overrides.mac.is_some() && state.mac.is_none() {
            return Err(Error::NoMac { id: state.id });
        }
        let rx = RateLimiter::restore(&state.rx_limiter)?;
        let tx = RateLimiter::restore(&state.tx_limiter)?;
        let params = NetParams {
            id: state.id,
            tap: overrides.tap.unwrap_or(state.tap),
            mac: overrides.mac.or(state.mac),
            mtu: state.mtu,
            rx_limits: rx.limits(),
            tx_limits: tx.limits(),
        };
        let tap = Tap::open(&params.id, &params.tap)?;
        Ok(Net { restored: true, ..Net::with_tap(params, tap, rx, tx)? })
    }

    /// Checks that [`restore`](Self::restore) can find the tap and set the address, and changes nothing.
    ///
    /// # Errors
    /// The tap does not exist, or the guest cannot have another MAC address.
    pub fn check(state: &NetState, overrides: &NetOverride) -> Result<(), Error> {
        if overrides.mac.is_some() && state.mac.is_none() {
            return Err(Error::NoMac { id: state.id.clone() });
        }
        Tap::check(&state.id, overrides.tap.as_ref().unwrap_or(&state.tap))
    }

    /// The interface of a door, whose frames come and go through a socket that keeps datagrams apart.
    ///
    /// # Errors
    /// There can be no timer or event.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn over(params: NetParams, socket: std::os::fd::OwnedFd) -> Result<Self, Error> {
        let rx = RateLimiter::new(params.rx_limits)?;
        let tx = RateLimiter::new(params.tx_limits)?;
        Net::with_tap(params, Tap::over(socket), rx, tx)
    }

    fn with_tap(params: NetParams, tap: Tap, rx: RateLimiter, tx: RateLimiter) -> Result<Self, Error> {
        Ok(Net {
            link: Link::new(&params.id, tap)?,
            params,
            rx: Receiver::new(rx),
            tx: Transmitter::new(tx),
            announce: false,
            restored: false,
        })
    }

    /// Its present parameters.
    pub fn params(&self) -> &NetParams {
        &self.params
    }

    /// Changes the given limits.
    pub fn set_limits(&mut self, rx: RateLimits, tx: RateLimits) {
        self.rx.limiter.change(rx);
        self.tx.limiter.change(tx);
        self.params.rx_limits = self.rx.limiter.limits();
        self.params.tx_limits = self.tx.limiter.limits();
        self.link.look_again();
    }

    fn status(&self) -> u16 {
        let link = if self.link.is_lost() { 0 } else { VIRTIO_NET_S_LINK_UP };
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        (link | announce) as u16
    }

    /// `struct virtio_net_config` (VIRTIO 1.2, 5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.params.mac.unwrap_or_default());
        config[6..8].copy_from_slice(&self.status().to_le_bytes());
        // One pair of queues; the field counts only with VIRTIO_NET_F_MQ.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.params.mtu.unwrap_or_default().to_le_bytes());
        config
    }
}

/// The offloads that the kernel may leave to a driver that accepted `features`. Segmentation needs checksums (VIRTIO
/// 1.2, 5.1.3.1).
fn offload(features: u64) -> u32 {
    let has = |feature: u32| features & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let offloads = [
        (VIRTIO_NET_F_GUEST_TSO4, tap::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, tap::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_UFO, tap::TUN_F_UFO),
    ];
    let wanted = offloads.iter().filter(|(feature, _)| has(*feature));
    wanted.fold(tap::TUN_F_CSUM, |all, (_, offload)| all | offload)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        id::NET
    }

    fn name(&self) -> &str {
        &self.params.id
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        let sometimes = [
            (VIRTIO_NET_F_MAC, self.params.mac.is_some()),
            (VIRTIO_NET_F_MTU, self.params.mtu.is_some()),
            (VIRTIO_NET_F_GUEST_UFO, self.link.tap.has_ufo()),
        ];
        let sometimes = sometimes.iter().filter(|(_, has)| *has).map(|(feature, _)| *feature);
        always.into_iter().chain(sometimes).fold(0, |all, feature| all | 1 << feature)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = config.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let len = from.len().min(data.len());
        data[..len].copy_from_slice(&from[..len]);
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        match self.link.tap.set_offload(offload(io.features)) {
            Err(error) if tap::is_gone(&error) => self.link.lose(io),
            result => result.map_err(|source| Broken::Host { doing: "set the offloads of the tap", source })?,
        }
        // The network must learn the guest's new place, and the guest may have a new address.
        if std::mem::take(&mut self.restored) {
            self.announce = io.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
            io.signal_config();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.rx.reset();
        self.announce = false;
        self.restored = false;
    }

    fn process_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        match queue {
            RX => {
                self.rx.count_kick();
                self.rx.receive(&mut self.link, io)
            }
            TX => {
                self.tx.count_kick();
                self.tx.transmit(&mut self.link, io)
            }
            _ => self.control(io),
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![
            Source { fd: self.link.tap.fd(), token: token::TAP },
            self.rx.limiter.source(token::RX_TIMER),
            self.tx.limiter.source(token::TX_TIMER),
            Source { fd: self.link.again().as_raw_fd(), token: token::AGAIN },
        ]
    }

    fn process_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        match token {
            token::TAP => {
                self.rx.count_tap_event();
                self.rx.receive_unless_waiting(&mut self.link, io)
            }
            token::RX_TIMER => self.rx.receive_unless_waiting(&mut self.link, io),
            token::TX_TIMER => self.tx.transmit(&mut self.link, io),
            _ => {
                let _ = self.link.again().read();
                self.rx.receive(&mut self.link, io)?;
                self.tx.transmit(&mut self.link, io)
            }
        }
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        let params = &self.params;
        postcard::to_stdvec(&NetState {
            id: params.id.clone(),
            tap: params.tap.clone(),
            mac: params.mac,
            mtu: params.mtu,
            rx_limiter: self.rx.limiter.save(),
            tx_limiter: self.tx.limiter.save(),
        })
    }

    fn rewind(&mut self, state: &[u8]) -> Result<(), Error> {
        let state: NetState = decode("network interface", state)?;
        self.rx.limiter.rewind(&state.rx_limiter);
        self.tx.limiter.rewind(&state.tx_limiter);
        self.params.rx_limits = self.rx.limiter.limits();
        self.params.tx_limits = self.tx.limiter.limits();
        self.rx.forget();
        self.announce = false;
        self.restored = true;
        // Frames that came for the former guest.
        self.link.tap.drop_waiting();
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        let mut metrics = serde_json::json!({ "tap_gone": self.link.is_lost() });
        if let Some(all) = metrics.as_object_mut() {
            all.extend(self.rx.metrics());
            all.extend(self.tx.metrics());
        }
        metrics
    }
}
