//! Who may change a pool: one process of one host.

use std::time::{Duration, Instant};

use super::error::Error;
use super::format::WRITER;
use super::lease::{Holder, SETTLE, now};
use super::medium::Medium;

/// Bytes of the writer's record: host, pid, heartbeat, checksum.
const RECORD: usize = 24;
/// How often a writer says that it lives.
const BEAT: Duration = Duration::from_secs(5);
/// A writer of another host is suspected when its last beat is so many seconds away.
const SUSPECT_S: u64 = 60;
/// How long it is watched then: clocks of hosts differ.
const WATCH: Duration = Duration::from_secs(20);

/// The right to write. Given back on drop.
///
/// Hosts that share a medium have no lock in common, and no operation that would make one. So the right is had as in
/// Fischer's algorithm (L. Lamport, "A Fast Mutual Exclusion Algorithm", ACM TOCS 5(1), 1987): who finds no writer says that
/// it is the writer, waits until everybody who found none has said so too, and is the writer if it still says so. Before
/// anything is published that is looked at once more.
pub(super) struct Lock<'m> {
    medium: &'m dyn Medium,
    me: Holder,
    beaten: Instant,
}

impl<'m> Lock<'m> {
    /// # Errors
    /// [`Error::Busy`], [`Error::Io`].
    pub fn take(medium: &'m dyn Medium) -> Result<Lock<'m>, Error> {
        let path = medium.path();
        let busy = |who: String| Error::Busy { path: path.to_path_buf(), who };
        let failed = || Error::io("lock", path);
        let me = Holder::of(medium)?;
        if !medium.try_lock(WRITER).map_err(failed())? {
            let (other, _) = read_record(medium)?;
            return Err(busy(format!("process {} of this host", other.pid)));
        }
        let unlock = |who: String| {
            // It ends with the handle, too.
            let _ = medium.unlock(WRITER);
            busy(who)
        };
        await_others(medium, me)?.map_or(Ok(()), |who| Err(unlock(who)))?;
        let mut lock = Lock { medium, me, beaten: Instant::now() };
        lock.write(me)?;
        if medium.facts().shared_between_hosts {
            std::thread::sleep(SETTLE);
        }
        match read_record(medium)?.0 == me {
            true => Ok(lock),
            false => Err(unlock("another host, which came at the same moment".to_string())),
        }
    }

    /// Says that this writer lives, if that was long ago.
    ///
    /// # Errors
    /// [`Error::Ousted`], [`Error::Io`].
    pub fn beat(&mut self) -> Result<(), Error> {
        match self.beaten.elapsed() > BEAT {
            true => self.check().and_then(|()| self.write(self.me)),
            false => Ok(()),
        }
    }

    /// Whether this is still the writer.
    ///
    /// # Errors
    /// [`Error::Ousted`], [`Error::Io`].
    pub fn check(&self) -> Result<(), Error> {
        let (writer, _) = read_record(self.medium)?;
        if writer == self.me {
            return Ok(());
        }
        let who = match writer.host {
            0 => "another host, which has finished".to_string(),
            _ => format!("process {} of another host", writer.pid),
        };
        Err(Error::Ousted { path: self.medium.path().to_path_buf(), who })
    }

    fn write(&mut self, holder: Holder) -> Result<(), Error> {
        self.beaten = Instant::now();
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

/// Who of another host is the writer, if one lives.
fn await_others(medium: &dyn Medium, me: Holder) -> Result<Option<String>, Error> {
    let (other, beat) = read_record(medium)?;
    if !medium.facts().shared_between_hosts || other.host == 0 || other.host == me.host {
        return Ok(None);
    }
    let age = now().abs_diff(beat);
    if age <= SUSPECT_S {
        return Ok(Some(format!("process {} of another host, last heard of {age} s ago", other.pid)));
    }
    let start = Instant::now();
    while start.elapsed() < WATCH {
        std::thread::sleep(SETTLE);
        match read_record(medium)? {
            found if found == (other, beat) => {}
            (found, _) if found.host == 0 => return Ok(None),
            (found, _) => return Ok(Some(format!("process {} of another host, whose clock differs", found.pid))),
        }
    }
    Ok(None)
}

fn read_record(medium: &dyn Medium) -> Result<(Holder, u64), Error> {
    let mut record = [0; RECORD];
    medium.read(WRITER, &mut record).map_err(Error::io("lock", medium.path()))?;
    Ok(decode(&record))
}

fn decode(record: &[u8; RECORD]) -> (Holder, u64) {
    let long = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap_or_default());
    let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap_or_default());
    let whole = crc32c::crc32c(&record[..20]) == word(20);
    let nobody = (Holder { host: 0, pid: 0 }, 0);
    if whole { (Holder { host: long(0), pid: word(8) }, long(12)) } else { nobody }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // If that fails, the lock itself still ends with its handle. Another's record is left alone.
        if self.check().is_ok() {
            let _ = self.write(Holder { host: 0, pid: 0 });
        }
        let _ = self.medium.unlock(WRITER);
    }
}
