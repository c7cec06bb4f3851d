//! The machine: configuration, KVM, vCPUs, guest memory, boot, capture and restore. It composes what the other rooms
//! offer and knows neither HTTP nor which policy made a plan.

pub mod accounting;
mod arch;
mod boot;
pub mod calibrate;
mod capture;
pub mod cold;
pub mod config;
pub mod console;
mod console_ring;
pub mod control;
pub mod controller;
mod devices;
mod error;
pub mod guest;
pub mod handler;
mod host;
mod lineage;
mod lines;
pub mod logging;
pub mod machine;
pub mod media;
mod memory;
mod metrics;
mod numa;
pub mod otlp;
mod planning;
mod pmem;
pub mod port_request;
mod promote;
mod read_backs;
pub mod record;
mod release;
pub mod report;
mod restore;
pub mod session;
pub mod sources;
pub mod stall;
mod state;
pub mod sys;
pub mod timeline;
pub mod usage;
mod vcpu;

pub use error::Error;
pub use restore::{EngineReport, FaultCounts};
pub use vcpu::Ending;
