//! Rate limiters: from config to device and back.

use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::{BucketLimit, RateLimits};

impl From<RateLimiterConfig> for RateLimits {
    fn from(config: RateLimiterConfig) -> Self {
        let limit = |bucket: TokenBucketConfig| BucketLimit {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or(0),
            refill_time_ms: bucket.refill_time,
        };
        RateLimits { bandwidth: config.bandwidth.map(limit), ops: config.ops.map(limit) }
    }
}

/// The config form of `limits`; `None` if there are none.
pub fn config_of(limits: RateLimits) -> Option<RateLimiterConfig> {
    let bucket = |limit: BucketLimit| TokenBucketConfig {
        size: limit.size,
        one_time_burst: (limit.one_time_burst > 0).then_some(limit.one_time_burst),
        refill_time: limit.refill_time_ms,
    };
    let config = RateLimiterConfig { bandwidth: limits.bandwidth.map(bucket), ops: limits.ops.map(bucket) };
    (config != RateLimiterConfig::default()).then_some(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_of_limits_is_what_they_were_made_from() {
        let bucket = TokenBucketConfig { size: 10, one_time_burst: Some(3), refill_time: 100 };
        let config = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
        assert_eq!(config_of(config.into()), Some(config));
        assert_eq!(config_of(RateLimits::default()), None);
    }
}
