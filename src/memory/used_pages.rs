//! The pages that a guest has used since its machine was restored, as the kernel's page map of this process tells.

use crate::snapshot::PageSet;

/// Pages that a guest has used.
#[derive(Clone, Debug, Default)]
pub struct UsedPages {
    /// Pages that are mapped, spilled or in swap: the guest has touched them, they were filled before it ran, or the
    /// kernel has mapped them beside a touched page of the same file.
    pub mapped: PageSet,
    /// Those of them that this process has a copy of.
    pub own: PageSet,
}
