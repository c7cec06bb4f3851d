//! The RAM of a guest: its ranges, and their places in the memory file.

use serde::{Deserialize, Serialize};

use super::{Error, Extent, Gfn, PAGE_SIZE, Result};

/// Guest memory ends here (bytes, 16 TiB), so that a guest frame number always fits 32 bits.
pub const MAX_GUEST_ADDRESS: u64 = 1 << 44;

/// The most ranges a layout may have.
pub const MAX_RANGES: usize = 16;

/// One contiguous range of guest RAM and its place in the memory file, all in bytes and page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRange {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the range in the memory file.
    pub file_offset: u64,
}

impl GuestRange {
    /// The range as pages.
    pub fn extent(&self) -> Extent {
        Extent { first: Gfn::containing(self.gpa), pages: self.len / PAGE_SIZE }
    }
}

/// The RAM of a guest: 1 to 16 ranges, sorted, disjoint, page aligned, below 2^44.
///
/// The memory file holds the ranges one after the other; holes between them (the MMIO gap) take no room in it.
/// A value of this type is always valid, also when it came through serde.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<GuestRange>", into = "Vec<GuestRange>")]
pub struct MemoryLayout {
    ranges: Vec<GuestRange>,
}

impl MemoryLayout {
    /// Checks the ranges and makes a layout of them.
    ///
    /// # Errors
    /// [`Error::BadLayout`] if any rule in the type's description is broken or a `file_offset` is not the sum of the
    /// lengths before it.
    pub fn new(ranges: Vec<GuestRange>) -> Result<MemoryLayout> {
        let bad = |problem: String| Err(Error::BadLayout { problem });
        if ranges.is_empty() || ranges.len() > MAX_RANGES {
            return bad(format!("it has {} ranges, allowed are 1 to {MAX_RANGES}", ranges.len()));
        }
        let mut gpa_end = 0;
        let mut file_end = 0;
        for (index, range) in ranges.iter().enumerate() {
            if range.gpa % PAGE_SIZE != 0 || range.len % PAGE_SIZE != 0 || range.len == 0 {
                return bad(format!("range {index} is empty or not page aligned"));
            }
            let Some(end) = range.gpa.checked_add(range.len).filter(|end| *end <= MAX_GUEST_ADDRESS) else {
                return bad(format!("range {index} ends above {MAX_GUEST_ADDRESS:#x}"));
            };
            if range.gpa < gpa_end {
                return bad(format!("range {index} overlaps the one before it or is out of order"));
            }
            if range.file_offset != file_end {
                return bad(format!("range {index} is at file offset {}, not at {file_end}", range.file_offset));
            }
            gpa_end = end;
            // Disjoint ranges below 2^44 cannot sum up to more than 2^44.
            file_end += range.len;
        }
        Ok(MemoryLayout { ranges })
    }

    /// A layout of `(gpa, len)` ranges in bytes; the file offsets follow from them.
    ///
    /// # Errors
    /// As for [`MemoryLayout::new`].
    pub fn from_gpa_ranges(ranges: &[(u64, u64)]) -> Result<MemoryLayout> {
        let mut file_offset = 0_u64;
        let place = |&(gpa, len): &(u64, u64)| {
            let range = GuestRange { gpa, len, file_offset };
            file_offset = file_offset.saturating_add(len);
            range
        };
        MemoryLayout::new(ranges.iter().map(place).collect())
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[GuestRange] {
        &self.ranges
    }

    /// The ranges as pages, ascending.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.ranges.iter().map(GuestRange::extent)
    }

    /// The number of pages the guest has.
    pub fn pages(&self) -> u64 {
        self.file_len() / PAGE_SIZE
    }

    /// The length of the memory file in bytes.
    pub fn file_len(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// The offset of a page in the memory file (bytes); `None` if the guest has no such page.
    pub fn file_offset(&self, gfn: Gfn) -> Option<u64> {
        let range = &self.ranges[self.range_of(gfn)?];
        Some(range.file_offset + (gfn.gpa() - range.gpa))
    }

    /// The page at a byte offset in the memory file; `None` past its end.
    pub fn gfn_at(&self, file_offset: u64) -> Option<Gfn> {
        let range = self.ranges.iter().find(|range| file_offset < range.file_offset + range.len)?;
        Some(Gfn::containing(range.gpa + (file_offset - range.file_offset)))
    }

    /// True if the extent is not empty and lies wholly within one range.
    pub fn contains(&self, extent: Extent) -> bool {
        self.extents().any(|range| {
            extent.pages > 0
                && extent.pages <= range.pages
                && range.contains(extent.first)
                && extent.end() <= range.end()
        })
    }

    /// The index of the range that has the page.
    pub(crate) fn range_of(&self, gfn: Gfn) -> Option<usize> {
        self.extents().position(|range| range.contains(gfn))
    }

    /// The parts of `extent` that the guest has, none crossing the end of a range, ascending.
    pub fn split(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.extents().filter_map(move |range| range.intersection(&extent))
    }
}

impl TryFrom<Vec<GuestRange>> for MemoryLayout {
    type Error = Error;

    fn try_from(ranges: Vec<GuestRange>) -> Result<MemoryLayout> {
        MemoryLayout::new(ranges)
    }
}

impl From<MemoryLayout> for Vec<GuestRange> {
    fn from(layout: MemoryLayout) -> Vec<GuestRange> {
        layout.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn two_ranges() -> MemoryLayout {
        MemoryLayout::from_gpa_ranges(&[(0, 2 * MIB), (4 << 30, MIB)]).unwrap()
    }

    #[test]
    fn layout_leaves_the_gap_out_of_the_file() {
        let layout = two_ranges();
        assert_eq!(layout.file_len(), 3 * MIB);
        assert_eq!(layout.pages(), 768);
        assert_eq!(layout.file_offset(Gfn(511)), Some(2 * MIB - PAGE_SIZE));
        assert_eq!(layout.file_offset(Gfn(512)), None);
        assert_eq!(layout.file_offset(Gfn(1 << 20)), Some(2 * MIB));
        assert_eq!(layout.file_offset(Gfn(u64::MAX)), None);
        assert_eq!(layout.gfn_at(2 * MIB), Some(Gfn(1 << 20)));
        assert_eq!(layout.gfn_at(3 * MIB), None);
    }

    #[test]
    fn layout_invalid_is_refused() {
        let many: Vec<_> = (0..17).map(|i| (i * 2 * PAGE_SIZE, PAGE_SIZE)).collect();
        let cases: [&[(u64, u64)]; 8] = [
            &[],
            &many,
            &[(0, 0)],
            &[(1, PAGE_SIZE)],
            &[(0, PAGE_SIZE + 1)],
            &[(MAX_GUEST_ADDRESS, PAGE_SIZE)],
            &[(u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)],
            &[(PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)],
        ];
        for ranges in cases {
            assert!(matches!(MemoryLayout::from_gpa_ranges(ranges), Err(Error::BadLayout { .. })), "{ranges:?}");
        }
        let wrong_offset = GuestRange { gpa: 0, len: PAGE_SIZE, file_offset: PAGE_SIZE };
        assert!(MemoryLayout::new(vec![wrong_offset]).is_err());
        assert!(serde_json::from_str::<MemoryLayout>(r#"[{"gpa":0,"len":1,"file_offset":0}]"#).is_err());
    }

    #[test]
    fn contains_refuses_extents_that_cross_a_range() {
        let layout = two_ranges();
        assert!(layout.contains(Extent::new(Gfn(0), 512)));
        assert!(!layout.contains(Extent::new(Gfn(0), 513)));
        assert!(!layout.contains(Extent::new(Gfn(0), 0)));
        assert!(!layout.contains(Extent::new(Gfn(1), u64::MAX)));
        assert!(!layout.contains(Extent::new(Gfn(u64::MAX), u64::MAX)));
    }
}
