//! The entropy device (VIRTIO 1.2, 5.4): random bytes of the host for the guest.

use std::io;

use serde::{Deserialize, Serialize};

use super::{Broken, Io, VirtioDevice, id};

const QUEUE_SIZES: [u16; 1] = [256];
/// A request gets at most so many bytes: a driver may ask for its whole memory.
const MAX_BYTES: usize = 64 << 10;

/// The device has no state of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {}

/// The entropy device.
#[derive(Debug, Default)]
pub struct Entropy {
    bytes: u64,
    buffer: Vec<u8>,
}

impl Entropy {
    pub fn new() -> Self {
        Entropy::default()
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        id::ENTROPY
    }

    fn name(&self) -> &str {
        "entropy"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn reset(&mut self) {}

    fn process_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain(queue, |io| {
            while let Some(chain) = io.pop(queue)? {
                let wanted = chain.writable.len().min(MAX_BYTES);
                self.buffer.resize(wanted, 0);
                fill(&mut self.buffer).map_err(|source| Broken::Host { doing: "get random bytes", source })?;
                let written = chain.writable.write_at(0, &self.buffer);
                self.bytes += written as u64;
                io.push(queue, chain.head, written as u32)?;
            }
            io.signal(queue)
        })
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_stdvec(&EntropyState {})
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!({ "bytes": self.bytes })
    }
}

/// Fills `buffer` from the kernel's generator.
fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        done += rustix::rand::getrandom(&mut buffer[done..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}
