//! The control queue (VIRTIO 1.2, 5.1.6.5): the driver reports that it has announced its address. Nothing else is
//! offered.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::super::{Broken, Io};
use super::Net;

/// The queue of commands.
pub const CONTROL: usize = 2;

impl Net {
    /// Answers all commands.
    pub(super) fn control(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain(CONTROL, |io| {
            while let Some(chain) = io.pop(CONTROL)? {
                let mut command = [0u8; 2];
                if chain.readable.read_at(0, &mut command) < command.len() || chain.writable.is_empty() {
                    return Err(Broken::Chain("a control command has no room for itself and its answer"));
                }
                let answer = match command.map(u32::from) {
                    [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK] => {
                        self.announce = false;
                        VIRTIO_NET_OK
                    }
                    _ => VIRTIO_NET_ERR,
                };
                let written = chain.writable.write_at(0, &[answer as u8]);
                io.push(CONTROL, chain.head, written as u32)?;
            }
            io.signal(CONTROL)
        })
    }
}
