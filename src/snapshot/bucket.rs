//! Buckets: guest pages by the layer that has their bytes, and by the time of their birth.

use serde::{Deserialize, Serialize};

/// A sort of guest pages. Each page is in one bucket, and moves to `Execution` when the guest has written it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bucket {
    /// Pages of the layers below the snapshot's own: the runtime that several functions share.
    Runtime,
    /// Pages of the snapshot's own layer: what the function had set up before the snapshot was taken.
    Init,
    /// Pages written since the restore, and pages of which the snapshot has no bytes (zeros).
    Execution,
}

impl Bucket {
    pub const ALL: [Bucket; 3] = [Bucket::Runtime, Bucket::Init, Bucket::Execution];
}

/// Pages of one bucket at a barrier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketPages {
    /// Pages that the VM has a copy of in local memory.
    pub local: u64,
    /// Pages that were seen to be read since the last barrier, and not to be written.
    pub read: u64,
    /// Pages that were seen to be written since the last barrier.
    pub written: u64,
    /// Pages given back by demotions that were touched since the last barrier.
    pub recalled: u64,
    /// Pages given back by demotions that were not touched since.
    pub away: u64,
}

/// A value for each bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByBucket<T> {
    pub runtime: T,
    pub init: T,
    pub execution: T,
}

impl<T> ByBucket<T> {
    /// Makes the value of each bucket by `make`.
    pub fn of(make: impl Fn(Bucket) -> T) -> Self {
        ByBucket { runtime: make(Bucket::Runtime), init: make(Bucket::Init), execution: make(Bucket::Execution) }
    }
}
