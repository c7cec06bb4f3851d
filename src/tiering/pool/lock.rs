//! The lock that lets one process of one host change a pool.

use std::time::Duration;

use super::error::Error;
use super::format::WRITER;
use super::lease::{PAUSE, READS, SETTLE, stood_still, uptime};
use super::lease_record::{Holder, now};
use super::medium::Medium;
use crate::sys::bounded_wait::Wait;

/// Bytes of the writer's record: host, pid, heartbeat, checksum.
const RECORD: usize = 24;
/// Time between two heartbeats of a writer.
const BEAT: Duration = Duration::from_secs(5);
/// Age in seconds at which another host's last heartbeat makes its writer suspect.
const SUSPECT_S: u64 = 60;
/// Time for which a suspected writer is watched: clocks of hosts differ.
const WATCH: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(20) };
/// Attempts to write the record within half of `SETTLE`.
const TRIES: usize = 8;

/// The right to write. Given back on drop.
///
/// Hosts that share a medium have no lock in common, and no operation that would make one. So writers use Fischer's
/// algorithm (L. Lamport, "A Fast Mutual Exclusion Algorithm", ACM TOCS 5(1), 1987): if the record is free, write our
/// id, sleep `SETTLE`, and own the lock if our id is still there. It is safe only if every host writes within `SETTLE`
/// of its read, so a writer that needed more than half of it starts again. A host that stood still for longer between
/// its read and its write can still take the lock from its owner. So the owner checks the record before every piece
/// that it writes, and once more before it publishes.
pub(super) struct Lock<'m> {
    medium: &'m dyn Medium,
    me: Holder,
    /// Time of the last heartbeat, taken just before its write, by [`uptime`].
    said: Duration,
}

impl<'m> Lock<'m> {
    /// Takes the lock; waits for suspected writers of other hosts.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Io`].
    pub fn take(medium: &'m dyn Medium) -> Result<Lock<'m>, Error> {
        let path = medium.path();
        let busy = |who: String| Error::Busy { path: path.to_path_buf(), who };
        let failed = || Error::io("lock", path);
        let me = Holder::of(medium)?;
        if !medium.try_lock(WRITER).map_err(failed())? {
            return Err(busy(match read_record(medium)? {
                Record::Of(other, _) => format!("process {} of this host", other.pid),
                Record::Nobody | Record::Torn(_) => "another process of this host".to_string(),
            }));
        }
        let unlock = |who: String| {
            // The lock ends with the handle, too.
            let _ = medium.unlock(WRITER);
            busy(who)
        };
        let mut lock = Lock { medium, me, said: uptime() };
        for _ in 0..TRIES {
            let found = match await_others(medium, me)? {
                Awaited::Lives(who) => return Err(unlock(who)),
                Awaited::Gone(found) => found,
            };
            let looked = uptime();
            if read_record(medium)? != found {
                continue;
            }
            lock.write(me)?;
            if !medium.facts().shared_between_hosts {
                return Ok(lock);
            }
            if uptime().saturating_sub(looked) > SETTLE / 2 {
                continue;
            }
            std::thread::sleep(SETTLE);
            return if lock.is_mine()? {
                Ok(lock)
            } else {
                Err(unlock("another host, which came at the same moment".to_string()))
            };
        }
        Err(unlock("another host, or this one is too slow to say in time that it writes".to_string()))
    }

    /// Checks that this process is still the writer, and writes a heartbeat if the last one is old.
    ///
    /// # Errors
    /// [`Error::Ousted`], [`Error::StoodStill`], [`Error::Io`].
    pub fn beat(&mut self) -> Result<(), Error> {
        let looked = uptime();
        let said = self.said;
        self.check()?;
        if looked.saturating_sub(said) > BEAT {
            self.write(self.me)?;
            self.stood_still(looked, said)?;
        }
        Ok(())
    }

    /// Makes a change that other hosts see, as the writer.
    ///
    /// # Errors
    /// [`Error::Ousted`] before the change; [`Error::StoodStill`] after it, if it may have come too late; those of
    /// `change`.
    pub fn as_writer(&mut self, change: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        self.beat()?;
        let looked = uptime();
        self.check()?;
        change()?;
        self.stood_still(looked, self.said)
    }

    fn stood_still(&self, looked: Duration, said: Duration) -> Result<(), Error> {
        if self.medium.facts().shared_between_hosts && stood_still(looked, said, WATCH) {
            Err(Error::StoodStill { path: self.medium.path().to_path_buf() })
        } else {
            Ok(())
        }
    }

    pub fn medium(&self) -> &'m dyn Medium {
        self.medium
    }

    fn is_mine(&self) -> Result<bool, Error> {
        Ok(matches!(read_record(self.medium)?, Record::Of(writer, _) if writer == self.me))
    }

    /// Checks that this process is still the writer.
    ///
    /// # Errors
    /// [`Error::Ousted`], [`Error::Io`].
    pub fn check(&self) -> Result<(), Error> {
        let who = match read_record(self.medium)? {
            Record::Of(writer, _) if writer == self.me => return Ok(()),
            Record::Of(writer, _) => format!("process {} of another host", writer.pid),
            Record::Nobody => "another host, which has finished".to_string(),
            Record::Torn(_) => "another host".to_string(),
        };
        Err(Error::Ousted { path: self.medium.path().to_path_buf(), who })
    }

    fn write(&mut self, holder: Holder) -> Result<(), Error> {
        self.said = uptime();
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&holder.host.to_le_bytes());
        record[8..12].copy_from_slice(&holder.pid.to_le_bytes());
        record[12..20].copy_from_slice(&now().to_le_bytes());
        let sum = crc32c::crc32c(&record[..20]);
        record[20..].copy_from_slice(&sum.to_le_bytes());
        let failed = || Error::io("lock", self.medium.path());
        self.medium.write(WRITER, &record).map_err(failed())?;
        if self.medium.facts().shared_between_hosts {
            self.medium.flush(WRITER, RECORD as u64).map_err(failed())?;
        }
        Ok(())
    }
}

/// The content of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Nobody,
    /// Being written, or its writer died while writing.
    Torn([u8; RECORD]),
    /// The writer, and its last heartbeat, seconds since 1970.
    Of(Holder, u64),
}

/// The result of waiting for writers of other hosts.
enum Awaited {
    Lives(String),
    /// None lives; the record's content.
    Gone(Record),
}

fn await_others(medium: &dyn Medium, me: Holder) -> Result<Awaited, Error> {
    let before = read_record(medium)?;
    match before {
        _ if !medium.facts().shared_between_hosts => return Ok(Awaited::Gone(before)),
        Record::Nobody => return Ok(Awaited::Gone(before)),
        Record::Of(other, _) if other.host == me.host => return Ok(Awaited::Gone(before)),
        Record::Of(other, beat) if now().abs_diff(beat) <= SUSPECT_S => {
            let age = now().abs_diff(beat);
            return Ok(Awaited::Lives(format!("process {} of another host, last heard of {age} s ago", other.pid)));
        }
        Record::Of(..) | Record::Torn(_) => {}
    }
    let start = uptime();
    let what = format!("the writer of pool {}, which may be on a host that is gone", medium.path().display());
    let mut wait = Wait::new(what, WATCH);
    while uptime().saturating_sub(start) < WATCH {
        wait.tell();
        std::thread::sleep(SETTLE);
        match read_record(medium)? {
            found if found == before => {}
            Record::Nobody => return Ok(Awaited::Gone(Record::Nobody)),
            Record::Of(found, _) => {
                return Ok(Awaited::Lives(format!("process {} of another host, whose clock differs", found.pid)));
            }
            Record::Torn(_) => return Ok(Awaited::Lives("another host".to_string())),
        }
    }
    Ok(Awaited::Gone(before))
}

/// Reads the record; a torn one several times.
fn read_record(medium: &dyn Medium) -> Result<Record, Error> {
    let mut record = [0; RECORD];
    for reads in 1.. {
        medium.read(WRITER, &mut record).map_err(Error::io("lock", medium.path()))?;
        if reads == READS || !matches!(decode(&record), Record::Torn(_)) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(decode(&record))
}

fn decode(record: &[u8; RECORD]) -> Record {
    let long = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap_or_default());
    let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap_or_default());
    let whole = crc32c::crc32c(&record[..20]) == word(20);
    if record.iter().all(|byte| *byte == 0) || whole && long(0) == 0 {
        Record::Nobody
    } else if whole {
        Record::Of(Holder { host: long(0), pid: word(8) }, long(12))
    } else {
        Record::Torn(*record)
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // If that fails, the lock itself still ends with its handle. Another writer's record is left alone.
        if self.check().is_ok() {
            let _ = self.write(Holder { host: 0, pid: 0 });
        }
        let _ = self.medium.unlock(WRITER);
    }
}
