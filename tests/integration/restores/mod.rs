//! Restores: policies, plans, profiles, faults.

mod bench;
mod burst;
mod default_policy;
mod functions;
mod hanging;
mod permissions;
mod plan_json;
mod planner;
mod plans;
mod profile;
mod promote;
mod restore;
mod uffd_handler;
