//! The page server's lending of memory to clients that read by RDMA: each data object is registered once, for as long
//! as a client reads it, and all of them together within a bound.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::backends::cold::wire::{Attached, Endpoint, RefusalReason};
use crate::backends::verbs;
use crate::backends::verbs::{Lent, Port};

/// The server's RDMA port and its bound on registered memory.
pub struct Lender {
    port: Port,
    /// Bytes that may be registered at once.
    limit: u64,
    registered: Arc<Mutex<u64>>,
}

/// Counts its bytes as registered while it lives.
struct Share {
    of: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.of.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
    }
}

/// A registered object, and its share of the bound.
struct Kept {
    lent: Arc<Lent>,
    _share: Share,
}

/// An object that is registered while there are loans of it.
#[derive(Default)]
pub struct Registered(Mutex<Weak<Kept>>);

/// One reader's connection, and the registration of the object that it reads.
pub struct Loan {
    /// Dropped before the registration that it uses.
    _connection: verbs::Loan,
    _kept: Arc<Kept>,
}

impl Lender {
    /// Lends through the device that has `address`, up to `limit` bytes at once.
    pub fn new(address: IpAddr, limit: u64) -> std::io::Result<Lender> {
        Ok(Lender { port: Port::at(address)?, limit, registered: Arc::default() })
    }

    fn share(&self, bytes: u64) -> Result<Share, (RefusalReason, String)> {
        let limit = self.limit >> 20;
        if bytes > self.limit {
            let why =
                format!("the snapshot has {} MiB, the page server may register {limit} MiB", bytes.div_ceil(1 << 20));
            return Err((RefusalReason::Never, why));
        }
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if *registered + bytes > self.limit {
            return Err((RefusalReason::Busy, format!("the page server has registered the {limit} MiB it may")));
        }
        *registered += bytes;
        Ok(Share { of: self.registered.clone(), bytes })
    }

    /// Lends `data`, of `len` bytes, to the client at `peer`.
    ///
    /// # Errors
    /// The reason for refusing the client.
    pub fn lend(
        &self,
        data: &File,
        len: u64,
        registered: &Registered,
        peer: SocketAddr,
        reader: Endpoint,
    ) -> Result<(Loan, Attached), (RefusalReason, String)> {
        let failed = |doing: &'static str| {
            move |error: std::io::Error| (RefusalReason::Failed, format!("cannot {doing}: {error}"))
        };
        // Held while the object is registered: other clients of the same object wait.
        let mut registered = registered.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = match registered.upgrade() {
            Some(kept) => kept,
            None => {
                let share = self.share(len)?;
                let lent = Lent::new(&self.port, data, len).map_err(failed("register the snapshot's data"))?;
                let kept = Arc::new(Kept { lent: Arc::new(lent), _share: share });
                *registered = Arc::downgrade(&kept);
                kept
            }
        };
        let lent = kept.lent.lend(peer.ip(), reader);
        let (connection, attached) = lent.map_err(failed("make a queue pair for the client"))?;
        Ok((Loan { _connection: connection, _kept: kept }, attached))
    }
}
