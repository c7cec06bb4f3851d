//! The balloon: its config, and the questions about it.

use crate::config::patch::{BalloonPatch, BalloonQuestion};

use super::virtio_devices::VirtioDevices;
use crate::config::BalloonConfig;
use crate::config::refusal::Refused;
use crate::devices;
use crate::devices::virtio::{Balloon, BalloonParams};
use crate::snapshot::{MemoryLayout, PAGE_SIZE};
use crate::sys::guest_memory::ReleasePages;

/// Makes the balloon of a config.
pub fn make(
    config: &BalloonConfig,
    layout: &MemoryLayout,
    release: Box<dyn ReleasePages>,
) -> Result<Balloon, devices::Error> {
    check_amount(config.amount_mib, layout)?;
    let BalloonConfig { amount_mib, deflate_on_oom, stats_polling_interval_s, .. } = *config;
    let free_page_hinting = config.free_page_hinting;
    let free_page_reporting = config.free_page_reporting;
    let params =
        BalloonParams { amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_hinting, free_page_reporting };
    Balloon::new(params, release)
}

/// The config that `balloon` would be made from.
pub fn config_of(balloon: &Balloon) -> BalloonConfig {
    let BalloonParams { amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_hinting, free_page_reporting } =
        *balloon.params();
    BalloonConfig { amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_hinting, free_page_reporting }
}

/// Refuses a balloon larger than the guest.
pub fn check_amount(amount_mib: u32, layout: &MemoryLayout) -> Result<(), devices::Error> {
    let ram_mib = (layout.pages() * PAGE_SIZE) >> 20;
    if u64::from(amount_mib) > ram_mib {
        return Err(devices::Error::BalloonTooLarge { amount_mib, ram_mib });
    }
    Ok(())
}

/// The refusal when there is no balloon. (Firecracker's sentence: clients match it.)
pub fn none() -> Refused {
    Refused::bad_request("No balloon device found.")
}

impl VirtioDevices {
    pub(super) fn patch_balloon(&mut self, patch: BalloonPatch, layout: &MemoryLayout) -> Result<(), Refused> {
        let config = self.configs.balloon.as_mut().ok_or_else(none)?;
        match patch {
            BalloonPatch::Amount(amount_mib) => {
                check_amount(amount_mib, layout).map_err(|error| Refused::bad_request_because(&error))?;
                config.amount_mib = amount_mib;
            }
            BalloonPatch::Interval(0) if config.stats_polling_interval_s > 0 => {
                return Err(Refused::bad_request("Balloon statistics cannot be disabled after the start."));
            }
            BalloonPatch::Interval(1..) if config.stats_polling_interval_s == 0 => {
                return Err(Refused::bad_request("Balloon statistics cannot be enabled after the start."));
            }
            BalloonPatch::Interval(interval) => config.stats_polling_interval_s = interval,
            BalloonPatch::StartHinting { .. } | BalloonPatch::StopHinting if !config.free_page_hinting => {
                return Err(hinting_is_off());
            }
            BalloonPatch::StartHinting { .. } | BalloonPatch::StopHinting => {}
        }
        let change = |balloon: &mut Balloon| {
            match patch {
                BalloonPatch::Amount(amount_mib) => balloon.set_amount(amount_mib),
                BalloonPatch::Interval(0) => {}
                BalloonPatch::Interval(interval) => balloon.set_interval(interval),
                BalloonPatch::StartHinting { acknowledge_on_stop } => {
                    if !balloon.start_hinting(acknowledge_on_stop) {
                        let what = "The guest has no driver that is ready for free page hinting.";
                        return (Err(Refused::bad_request(what)), false);
                    }
                }
                BalloonPatch::StopHinting => balloon.stop_hinting(),
            }
            (Ok(()), !matches!(patch, BalloonPatch::Interval(_)))
        };
        self.with("balloon", change).ok_or_else(none)?
    }

    /// Answers a question about the balloon, other than the one about its config.
    pub fn ask_balloon(&self, question: BalloonQuestion) -> Result<serde_json::Value, Refused> {
        let config = self.configs.balloon.as_ref().ok_or_else(none)?;
        match question {
            BalloonQuestion::Statistics if config.stats_polling_interval_s == 0 => {
                return Err(Refused::bad_request("Statistics for the balloon device are not enabled."));
            }
            BalloonQuestion::Hinting if !config.free_page_hinting => return Err(hinting_is_off()),
            _ => {}
        }
        let ask = |balloon: &mut Balloon| match question {
            BalloonQuestion::Config => (serde_json::json!(config_of(balloon)), false),
            BalloonQuestion::Statistics => (balloon.statistics(), false),
            BalloonQuestion::Hinting => (balloon.hinting_status(), false),
        };
        self.with("balloon", ask).ok_or_else(none)
    }
}

fn hinting_is_off() -> Refused {
    Refused::bad_request("Free page hinting of the balloon device is not enabled.")
}
