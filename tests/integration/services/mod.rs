//! The API of a VM, and `tvmm serve`.

mod api;
mod otlp;
mod serve;
mod serve_access;
mod serve_audit;
mod serve_doors;
mod serve_drives;
mod serve_faults;
mod serve_fork;
mod serve_idle;
mod serve_memory;
mod serve_moments;
mod serve_netns;
mod serve_repurpose;
mod serve_rewind;
mod serve_standby;
mod serve_tiers;
mod serve_tls;
mod serve_ui;
mod serve_unit;
mod trace;
