//! Size classes of the heap: steps of 16 bytes up to 512, as CPython's pymalloc has them, then four steps for each
//! doubling.

/// Larger blocks are pages of their own, as beyond malloc's mmap threshold.
pub const BLOCK_MAX: usize = 128 << 10;
pub const CLASSES: usize = 64;
const SMALL_MAX: usize = 512;
const SMALL_STEP: usize = 16;
const SMALL_CLASSES: usize = SMALL_MAX / SMALL_STEP;

/// The class of blocks of at least `size` bytes, 1 to [`BLOCK_MAX`].
pub const fn class_of(size: usize) -> usize {
    if size <= SMALL_MAX {
        return (size - 1) / SMALL_STEP;
    }
    let shift = (size - 1).ilog2() as usize;
    SMALL_CLASSES + (shift - 9) * 4 + ((size - 1 - (1 << shift)) >> (shift - 2))
}

/// Bytes of a block of `class`, below [`CLASSES`].
pub const fn block_size(class: usize) -> usize {
    if class < SMALL_CLASSES {
        return (class + 1) * SMALL_STEP;
    }
    let (shift, step) = ((class - SMALL_CLASSES) / 4 + 9, (class - SMALL_CLASSES) % 4 + 1);
    (1 << shift) + (step << (shift - 2))
}

/// Pages that a class takes at a time: one pool for small blocks, four blocks of the others.
pub const fn span_pages(class: usize) -> u64 {
    let size = block_size(class);
    if size <= SMALL_MAX { 1 } else { (size as u64 * 4).div_ceil(crate::PAGE_SIZE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_fits_its_class_and_wastes_little() {
        for size in 1..=BLOCK_MAX {
            let (class, block) = (class_of(size), block_size(class_of(size)));
            assert!(class < CLASSES && block >= size && block % 16 == 0, "{size}: class {class} of {block}");
            assert!(block - size <= (size / 4).max(15), "{size} in {block}");
            assert_eq!(class_of(block), class);
        }
        assert_eq!(block_size(CLASSES - 1), BLOCK_MAX);
    }

    #[test]
    fn powers_of_two_have_classes_of_their_own() {
        for shift in 4..=17 {
            assert_eq!(block_size(class_of(1 << shift)), 1 << shift);
        }
    }

    #[test]
    fn spans_hold_at_least_four_blocks() {
        assert!((0..CLASSES).all(|class| span_pages(class) * crate::PAGE_SIZE >= 4 * block_size(class) as u64));
    }
}
