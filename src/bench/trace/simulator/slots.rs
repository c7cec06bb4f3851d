//! Things that come and go often, found by names that are never given twice.

/// The name of a thing: its place, and the number of things that were there before.
pub(super) type Id = u64;

#[derive(Debug)]
struct Slot<T> {
    former: u32,
    thing: Option<T>,
}

/// The things that are there.
#[derive(Debug)]
pub(super) struct Slots<T> {
    all: Vec<Slot<T>>,
    free: Vec<u32>,
}

fn place_of(id: Id) -> usize {
    (id & u64::from(u32::MAX)) as usize
}

impl<T> Slots<T> {
    pub(super) fn new() -> Slots<T> {
        Slots { all: Vec::new(), free: Vec::new() }
    }

    /// Adds a thing. Returns its name.
    pub(super) fn add(&mut self, thing: T) -> Id {
        let place = self.free.pop().unwrap_or_else(|| {
            self.all.push(Slot { former: 0, thing: None });
            self.all.len() as u32 - 1
        });
        let slot = &mut self.all[place as usize];
        slot.thing = Some(thing);
        (u64::from(slot.former) << 32) | u64::from(place)
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<T> {
        self.get(id)?;
        let slot = &mut self.all[place_of(id)];
        slot.former += 1;
        self.free.push(place_of(id) as u32);
        slot.thing.take()
    }

    pub(super) fn get(&self, id: Id) -> Option<&T> {
        let slot = self.all.get(place_of(id))?;
        slot.thing.as_ref().filter(|_| u64::from(slot.former) == id >> 32)
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let slot = self.all.get_mut(place_of(id))?;
        slot.thing.as_mut().filter(|_| u64::from(slot.former) == id >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_one_thing_only() {
        let mut slots = Slots::new();
        let [one, two] = ["one", "two"].map(|thing| slots.add(thing));
        assert_eq!((slots.remove(one), slots.remove(one), slots.get(one)), (Some("one"), None, None));
        let three = slots.add("three");
        assert_eq!(place_of(three), place_of(one), "places are used again");
        assert_eq!((slots.get(one), slots.get(three), slots.get(two)), (None, Some(&"three"), Some(&"two")));
        assert_eq!(slots.get_mut(three), Some(&mut "three"));
        assert_eq!(slots.get_mut(one), None);
        assert_eq!(slots.get(7), None);
    }
}
