//! The order in which a run touched pages.

use crate::snapshot::{Extent, PageSet};

/// The most layers a profile can have; recorders that see more put the rest into the last.
pub const MAX_LAYERS: usize = 1024;

/// The order in which pages were touched first.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Every page of the working set once, in the order of its first touch.
    Exact(Vec<Extent>),
    /// Disjoint layers, together the working set. A page of an earlier layer was touched before one of a later layer;
    /// within a layer the order is unknown.
    Layers(Vec<PageSet>),
    /// The recorder saw no order.
    Unknown,
}

/// Checks that `order` is one of exactly `pages`.
pub fn check(order: &Order, pages: &PageSet) -> Result<(), String> {
    let mut seen = PageSet::new();
    let mut total = 0_u64;
    match order {
        Order::Unknown => return Ok(()),
        Order::Exact(extents) => {
            for extent in extents {
                if extent.is_empty() {
                    return Err("its order has an empty run".to_string());
                }
                seen.insert_run(*extent);
                total = total.saturating_add(extent.pages);
            }
        }
        Order::Layers(layers) => {
            if layers.len() > MAX_LAYERS {
                return Err(format!("it has {} layers, at most {} fit", layers.len(), MAX_LAYERS));
            }
            for layer in layers {
                seen.union_with(layer);
                total = total.saturating_add(layer.len());
            }
        }
    }
    if total != seen.len() || seen != *pages {
        return Err("its order is not of each of its pages once".to_string());
    }
    Ok(())
}
