//! RDMA over Converged Ethernet (RoCE v2) through libibverbs, which is loaded when it is first used: reliable
//! connections on which one side lends memory (`lend`) and the other reads it (`read`) without the lender's CPU.
//!
//! Verbs, states of a queue pair and their attributes: InfiniBand Architecture Specification, volume 1, chapters 10 and
//! 11; ibv_modify_qp(3), ibv_reg_mr(3). Addresses: annex A17 (RoCE v2), in which a GID is an IP address.

mod connection;
mod lend;
mod port;
mod queue_pair;
mod read;
#[cfg(test)]
mod tests;

pub use lend::{Lent, Loan};
pub use port::{Port, devices};
pub use read::{Reader, Waited};

#[cfg(target_feature = "crt-static")]
compile_error!(
    "the feature `rdma` loads libibverbs when it runs, which a static binary cannot: build without crt-static"
);
