//! The artefact: a snapshot on disk and in memory.
//!
//! Owns: file formats, layers and chains of diffs, writing, reading, merging, verification, working-set images, and the
//! nouns that every room shares (pages, extents, layouts, restore plans). `docs/snapshot-format.md` describes every
//! byte.
//! Must not know: any other room, KVM, tiers. A file it reads is taken to be hostile: no length, offset or count is
//! believed before it was checked against the real file.
//! Start reading: `types.rs`, `layout.rs`, `plan.rs`, then `chain.rs` (which layer a page comes from) and `writer.rs`.

mod bucket;
mod cache_lookup;
mod chain;
mod checked_reader;
mod cold_spec;
mod container;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod drives;
mod encrypt;
mod error;
mod files;
mod fork_point;
mod ids;
mod image;
mod key_source;
mod layout;
pub mod lru;
mod manifest;
mod mappings;
mod memory_check;
mod merge;
mod page_map;
mod page_set;
mod page_source;
mod partial;
mod plan;
mod plan_codec;
mod read_back;
mod reader;
mod restore_choice;
mod sealing;
mod signed;
mod signing;
mod types;
mod unchanged;
mod writer;
mod zero_pages;

#[cfg(test)]
pub(crate) mod tests;

pub use bucket::{Bucket, BucketPages, ByBucket};
pub use cache_lookup::CacheLookup;
pub use chain::{
    Chain, Content, MAX_CHAIN_DEPTH, MAX_MERGED_DEPTH, ResolvedRun, Trust, derived_dir, used_profile_path,
};
pub use cold_spec::{Cold, ColdCache, ColdSpec, NoColdPool, is_object_url};
pub use container::{
    CONTAINER_MAGIC, Container, FORMAT_MAJOR, FORMAT_MINOR, Section, SectionInfo, SectionKind, write_container,
};
pub use drives::{CopyMethod, DriveCopy, copy_drive, copy_drive_while};
pub use encrypt::encrypt_files;
pub use error::{Error, Result};
pub(crate) use files::open_regular;
pub use files::{Durability, PRIVATE, append_private, create_new, create_private_dir, overwrite_private, read_limited};
pub use fork_point::ForkPoint;
pub use ids::{BadDigestText, Digest, PoolId, Sha256Digest, SnapshotId, TierId};
pub use image::{Image, ImageOrigin, ImageState, bound_derived, check_image, image_name};
pub use key_source::KeySource;
pub use layout::{GuestRange, MAX_GUEST_ADDRESS, MAX_RANGES, MemoryLayout};
pub use manifest::{
    DIR_FILES, Digests, ENCRYPTED_MEMORY, FeatureWord, FileSizes, HostFacts, Location, MachineFacts, Manifest, Parent,
    SnapshotKind, is_snapshot_dir,
};
pub use mappings::{Folios, Mapping, View};
pub use memory_check::{BadChunk, ReadAt, VerifyReport};
pub use merge::{merge, page_digest};
pub use page_map::{CHUNK_PAGES, ChunkHasher, PageMap, chunk_of};
pub use page_set::PageSet;
pub use page_source::{PageOrigin, PageSource};
pub use partial::{PartialDir, PartialFile, is_partial, random_hex, replace_file, sweep, sweep_own, write_limited};
pub use plan::{
    Background, BackgroundAction, Fill, ImageSpec, Placement, PlacementCounts, PlannedExtent, RestorePlan, TierAccess,
    TierSource,
};
pub use plan_codec::{JsonPlan, StoredPlan};
pub use read_back::{LoadHuge, ReadBack};
pub use reader::Snapshot;
pub use restore_choice::{DRAM_PRICE_US, InPlaceMapping, Policy, PolicyReason, UnknownPolicy, Verify};
pub use sealing::{NoKey, ObjectKey, SALT_LEN, SecretKey, TAG_LEN, Unsealable, new_salt};
pub use signed::{SignaturePaths, TrustedKeys};
pub use signing::{SigningKey, make_keys, sign};
pub use types::{Extent, Gfn, HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, PAGE_SIZE};
pub use unchanged::Doubtful;
pub use writer::{SealInput, Sealed, SnapshotWriter};
pub use zero_pages::is_zero;
