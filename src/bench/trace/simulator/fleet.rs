//! The VMs of a simulated service, and the room for them.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::giving::Giving;
use super::slots::{Id, Slots};
use crate::bench::trace::service::Limits;
use crate::tiering::idle::{Descended, Step};

/// The name of a VM. No two VMs of a simulation have the same.
pub(super) type VmId = Id;

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    /// A request runs in it.
    Busy,
    /// It waits for the next request, at some step.
    Idle,
    /// It is being restored to stand by.
    Refilled,
    /// It stands by.
    Ready,
    /// It has finished, and its process waits for another VM.
    Spare,
    /// It goes back to its snapshot.
    Returns,
    /// It is being made, or ends.
    Leaving,
}

#[derive(Debug)]
struct Vm {
    function: u32,
    mem_mib: u64,
    /// Local memory.
    mib: f64,
    /// That before it took steps, of a VM that waits.
    full_mib: f64,
    state: State,
    since_us: u64,
    has_served: bool,
    /// The way down of a VM that waits.
    descended: Descended,
    /// It takes a step at present.
    is_stepping: bool,
    /// A request waits for the end of its step.
    is_claimed: bool,
    /// The moment of its next timer.
    timer_us: u64,
    giving: Giving,
}

/// A VM that waits for the next request: whether it takes a step at present, the one that it is at, and the time since
/// which it waits.
type Waiting = (bool, Option<Step>, Reverse<u64>, VmId);

impl Vm {
    fn waiting(&self, id: VmId) -> Waiting {
        (self.is_stepping, self.descended.step, Reverse(self.since_us), id)
    }
}

/// The VMs.
#[derive(Debug)]
pub(super) struct Fleet {
    vms: Slots<Vm>,
    /// VMs that have a process.
    living: usize,
    /// Guest memory of these.
    mem_mib: u64,
    limits: Limits,
    /// VMs that another one may push out, by state, then by the time since which they wait.
    waiting: BTreeSet<(State, u64, VmId)>,
    /// VMs that stand by, by function.
    ready: Vec<BTreeSet<VmId>>,
    /// VMs that wait for the next request, by function: those that take no step first, of these those at the first
    /// step, and of these those that were used last.
    idle: Vec<BTreeSet<Waiting>>,
    /// VMs that requests use or that go back to their snapshot, by function.
    busy: Vec<usize>,
    /// Kept processes.
    spares: usize,
    /// VMs that are suspended.
    suspended: usize,
}

impl Fleet {
    pub(super) fn new(functions: usize, limits: Limits) -> Fleet {
        Fleet {
            vms: Slots::new(),
            living: 0,
            mem_mib: 0,
            limits,
            waiting: BTreeSet::new(),
            ready: vec![BTreeSet::new(); functions],
            idle: vec![BTreeSet::new(); functions],
            busy: vec![0; functions],
            spares: 0,
            suspended: 0,
        }
    }

    pub(super) fn has_room(&self, mem_mib: u64) -> bool {
        self.living < self.limits.max_vms && self.mem_mib + mem_mib <= self.limits.memory_mib
    }

    /// Adds a VM that is being restored.
    pub(super) fn add(&mut self, function: u32, mem_mib: u64, mib: f64) -> VmId {
        self.living += 1;
        self.mem_mib += mem_mib;
        let vm = Vm {
            function,
            mem_mib,
            mib,
            full_mib: mib,
            state: State::Leaving,
            since_us: 0,
            has_served: false,
            descended: Descended::default(),
            is_stepping: false,
            is_claimed: false,
            timer_us: 0,
            giving: Giving::default(),
        };
        self.vms.add(vm)
    }

    /// Takes a VM out of the lists that its state puts it in.
    fn unlist(&mut self, id: VmId) {
        let Some(vm) = self.vms.get(id) else { return };
        self.waiting.remove(&(vm.state, vm.since_us, id));
        match vm.state {
            State::Ready => drop(self.ready[vm.function as usize].remove(&id)),
            State::Idle => drop(self.idle[vm.function as usize].remove(&vm.waiting(id))),
            State::Busy | State::Returns => self.busy[vm.function as usize] -= 1,
            State::Spare => self.spares -= 1,
            _ => {}
        }
    }

    /// Changes the state of a VM.
    pub(super) fn set(&mut self, id: VmId, state: State, now_us: u64) {
        self.unlist(id);
        let Some(vm) = self.vms.get_mut(id) else { return };
        vm.state = state;
        vm.since_us = now_us;
        vm.descended = Descended::default();
        vm.is_stepping = false;
        vm.is_claimed = false;
        vm.full_mib = vm.mib;
        match state {
            State::Ready => drop(self.ready[vm.function as usize].insert(id)),
            State::Idle => drop(self.idle[vm.function as usize].insert(vm.waiting(id))),
            State::Busy | State::Returns => self.busy[vm.function as usize] += 1,
            State::Spare => self.spares += 1,
            _ => {}
        }
        if matches!(state, State::Idle | State::Ready | State::Spare) {
            self.waiting.insert((state, now_us, id));
        }
    }

    /// Removes a VM. Returns its local memory.
    pub(super) fn remove(&mut self, id: VmId) -> f64 {
        self.unlist(id);
        let Some(vm) = self.vms.remove(id) else { return 0.0 };
        if vm.descended.step == Some(Step::Suspended) {
            self.suspended -= 1;
        } else {
            self.living -= 1;
            self.mem_mib -= vm.mem_mib;
        }
        vm.mib
    }

    /// Notes that a VM which waits has begun to take a step.
    pub(super) fn begin_step(&mut self, id: VmId) {
        let Some(vm) = self.vms.get_mut(id).filter(|vm| vm.state == State::Idle) else { return };
        let idle = &mut self.idle[vm.function as usize];
        idle.remove(&vm.waiting(id));
        vm.is_stepping = true;
        idle.insert(vm.waiting(id));
    }

    /// Lets a request wait for the end of a VM's step: no other one finds the VM, and no other VM takes its place.
    pub(super) fn claim(&mut self, id: VmId) {
        let Some(vm) = self.vms.get_mut(id) else { return };
        vm.is_claimed = true;
        self.idle[vm.function as usize].remove(&vm.waiting(id));
        self.waiting.remove(&(vm.state, vm.since_us, id));
    }

    /// Lets a VM that waits be this far down; it takes no step any more. One that is suspended takes no room, and makes
    /// none.
    pub(super) fn descend(&mut self, id: VmId, descended: Descended) {
        let Some(vm) = self.vms.get_mut(id).filter(|vm| vm.state == State::Idle) else { return };
        let idle = &mut self.idle[vm.function as usize];
        idle.remove(&vm.waiting(id));
        vm.is_stepping = false;
        vm.descended = descended;
        if !vm.is_claimed {
            idle.insert(vm.waiting(id));
        }
        if descended.step == Some(Step::Suspended) {
            self.waiting.remove(&(State::Idle, vm.since_us, id));
            self.suspended += 1;
            self.living -= 1;
            self.mem_mib -= vm.mem_mib;
        }
    }

    /// The VM that serves the next request of a function, if one waits.
    pub(super) fn idle(&self, function: u32) -> Option<VmId> {
        self.idle[function as usize].first().map(|(.., id)| *id)
    }

    pub(super) fn descended(&self, id: VmId) -> Descended {
        self.vms.get(id).map(|vm| vm.descended).unwrap_or_default()
    }

    pub(super) fn is_stepping(&self, id: VmId) -> bool {
        self.vms.get(id).is_some_and(|vm| vm.is_stepping)
    }

    /// The local memory that a VM had before it took steps.
    pub(super) fn full_mib(&self, id: VmId) -> f64 {
        self.vms.get(id).map_or(0.0, |vm| vm.full_mib)
    }

    /// VMs that have a process, those that are being made included.
    pub(super) fn living(&self) -> usize {
        self.living - self.spares
    }

    pub(super) fn suspended(&self) -> usize {
        self.suspended
    }

    /// Changes the local memory of a VM. Returns the difference.
    pub(super) fn set_memory(&mut self, id: VmId, mib: f64) -> f64 {
        let Some(vm) = self.vms.get_mut(id) else { return 0.0 };
        let more = mib - vm.mib;
        vm.mib = mib;
        more
    }

    /// Lets a VM have no more local memory than this. Returns the difference.
    pub(super) fn shrink(&mut self, id: VmId, mib: f64) -> f64 {
        let Some(vm) = self.vms.get_mut(id) else { return 0.0 };
        vm.full_mib = vm.full_mib.min(mib);
        let more = vm.mib.min(mib) - vm.mib;
        vm.mib += more;
        more
    }

    /// The windows of a VM.
    pub(super) fn giving(&mut self, id: VmId) -> Option<&mut Giving> {
        self.vms.get_mut(id).map(|vm| &mut vm.giving)
    }

    /// A VM has answered a request.
    pub(super) fn serve(&mut self, id: VmId) {
        if let Some(vm) = self.vms.get_mut(id) {
            vm.has_served = true;
        }
    }

    pub(super) fn has_served(&self, id: VmId) -> bool {
        self.vms.get(id).is_some_and(|vm| vm.has_served)
    }

    pub(super) fn is(&self, id: VmId, state: State) -> bool {
        self.vms.get(id).is_some_and(|vm| vm.state == state)
    }

    pub(super) fn since(&self, id: VmId) -> u64 {
        self.vms.get(id).map_or(0, |vm| vm.since_us)
    }

    /// The function of a VM that is there.
    pub(super) fn function(&self, id: VmId) -> u32 {
        self.vms.get(id).map_or(0, |vm| vm.function)
    }

    /// Sets the moment of a VM's next timer. Earlier ones no longer count.
    pub(super) fn arm(&mut self, id: VmId, at_us: u64) {
        if let Some(vm) = self.vms.get_mut(id) {
            vm.timer_us = at_us;
        }
    }

    pub(super) fn is_armed(&self, id: VmId, at_us: u64) -> bool {
        self.vms.get(id).is_some_and(|vm| vm.timer_us == at_us)
    }

    /// VMs of a function that stand by.
    pub(super) fn ready(&self, function: u32) -> usize {
        self.ready[function as usize].len()
    }

    /// VMs of a function that requests use, or that go back to their snapshot.
    pub(super) fn in_use(&self, function: u32) -> usize {
        self.busy[function as usize]
    }

    /// A VM of a function that stands by.
    pub(super) fn first_ready(&self, function: u32) -> Option<VmId> {
        self.ready[function as usize].first().copied()
    }

    /// The VM that has been longest in a state in which it waits.
    pub(super) fn oldest(&self, state: State) -> Option<VmId> {
        self.in_state(state).next()
    }

    /// The VM that waits for the next request for longest, one that takes no step before others.
    pub(super) fn longest_idle(&self) -> Option<VmId> {
        self.in_state(State::Idle).find(|id| !self.is_stepping(*id)).or_else(|| self.oldest(State::Idle))
    }

    /// A kept process; with `mem_mib`, of a VM of this size.
    pub(super) fn spare(&self, mem_mib: Option<u64>) -> Option<VmId> {
        let is_fit = |id: &VmId| mem_mib.is_none_or(|mib| self.vms.get(*id).is_some_and(|vm| vm.mem_mib == mib));
        self.in_state(State::Spare).find(is_fit)
    }

    pub(super) fn count_spares(&self) -> usize {
        self.spares
    }

    fn in_state(&self, state: State) -> impl Iterator<Item = VmId> {
        let all = self.waiting.range((state, 0, 0)..=(state, u64::MAX, VmId::MAX));
        all.map(|(_, _, id)| *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_and_lists_follow_the_states() {
        let mut fleet = Fleet::new(2, Limits { memory_mib: 300, max_vms: 2, max_running: 4 });
        let first = fleet.add(0, 100, 5.0);
        assert!(fleet.has_room(200) && !fleet.has_room(201));
        let second = fleet.add(1, 100, 7.0);
        assert!(!fleet.has_room(1), "the number of VMs is limited, too");
        fleet.set(first, State::Ready, 10);
        fleet.set(second, State::Busy, 10);
        assert_eq!((fleet.ready(0), fleet.ready(1), fleet.in_use(1)), (1, 0, 1));
        assert_eq!((fleet.first_ready(0), fleet.oldest(State::Ready)), (Some(first), Some(first)));
        fleet.set(first, State::Spare, 20);
        fleet.set(second, State::Spare, 15);
        assert_eq!((fleet.spare(None), fleet.spare(Some(50)), fleet.count_spares()), (Some(second), None, 2));
        assert_eq!(fleet.set_memory(first, 6.0), 1.0);
        assert_eq!((fleet.remove(first), fleet.remove(first)), (6.0, 0.0));
        assert_eq!((fleet.ready(0), fleet.in_use(1), fleet.has_room(200)), (0, 0, true));
    }

    #[test]
    fn requests_take_the_vm_at_the_first_step_that_was_used_last() {
        let mut fleet = Fleet::new(1, Limits { memory_mib: 300, max_vms: 9, max_running: 4 });
        let vms = [1, 2, 3].map(|now| {
            let vm = fleet.add(0, 100, 5.0);
            fleet.set(vm, State::Idle, now);
            vm
        });
        assert_eq!((fleet.idle(0), fleet.oldest(State::Idle)), (Some(vms[2]), Some(vms[0])));
        fleet.descend(vms[2], Some(Step::Parked).into());
        assert_eq!(fleet.idle(0), Some(vms[1]));
        fleet.begin_step(vms[1]);
        assert_eq!((fleet.idle(0), fleet.is_stepping(vms[1])), (Some(vms[0]), true));
        fleet.descend(vms[1], Descended::default());
        assert_eq!((fleet.idle(0), fleet.is_stepping(vms[1])), (Some(vms[1]), false));
        let claimed = fleet.add(0, 10, 5.0);
        fleet.set(claimed, State::Idle, 4);
        fleet.begin_step(claimed);
        fleet.claim(claimed);
        fleet.descend(claimed, Descended::default());
        assert_eq!(fleet.idle(0), Some(vms[1]), "a claimed VM is for its request");
        fleet.remove(claimed);
        fleet.descend(vms[0], Some(Step::Suspended).into());
        assert!(fleet.has_room(100), "a suspended VM takes no room");
        assert_eq!((fleet.living(), fleet.suspended()), (2, 1));
        assert_eq!(fleet.oldest(State::Idle), Some(vms[1]));
        fleet.remove(vms[1]);
        fleet.remove(vms[2]);
        assert_eq!((fleet.idle(0), fleet.descended(vms[0]).step), (Some(vms[0]), Some(Step::Suspended)));
        fleet.remove(vms[0]);
        assert!(fleet.has_room(300) && fleet.idle(0).is_none());
        assert_eq!((fleet.living(), fleet.suspended()), (0, 0));
    }
}
