//! Server connections: their state, the time limit of their client, and the choice of one to close for a new one.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

/// Idle time after which a connection may be closed for a new one, when there are as many as allowed.
pub(crate) const IDLE_RIGHT: Duration = Duration::from_secs(10);
/// Time to wait for the end of such a connection.
pub(crate) const MAKE_ROOM: Duration = Duration::from_millis(100);
/// Time that a client may take for an answer, however small.
pub(crate) const ANSWER_TIME: Duration = Duration::from_secs(10);
/// A client that takes this many bytes in a second may go on: large answers over slow networks get through.
const SLOWEST: u64 = 64 << 10;

/// The state of a connection's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Between requests.
    Idle,
    /// The head has begun to arrive.
    Head,
    /// The request is being served.
    Busy,
}

/// The present state of a connection.
#[derive(Debug)]
pub(crate) struct Phase {
    now: Mutex<(Step, Instant)>,
    makes_room: Notify,
}

impl Phase {
    fn new() -> Phase {
        Phase { now: Mutex::new((Step::Idle, Instant::now())), makes_room: Notify::new() }
    }

    pub(crate) fn set(&self, step: Step) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = (step, Instant::now());
    }

    pub(crate) fn get(&self) -> Step {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// The time it has been idle; `None` if it is not.
    fn idle_for(&self) -> Option<Duration> {
        let (step, since) = *self.now.lock().unwrap_or_else(PoisonError::into_inner);
        (step == Step::Idle).then(|| since.elapsed())
    }

    /// Waits until the connection has to end for another. A connection that got a request meanwhile goes on.
    pub(crate) async fn ends(&self) {
        loop {
            self.makes_room.notified().await;
            if self.get() == Step::Idle {
                return;
            }
        }
    }
}

/// The open connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(Arc<Mutex<Vec<Weak<Phase>>>>);

impl Connections {
    /// Adds a connection, which leaves when its phase is dropped.
    pub(crate) fn add(&self) -> Arc<Phase> {
        let phase = Arc::new(Phase::new());
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Dropped phases are removed only when the list is full, so that this costs little however many there are.
        if all.len() == all.capacity() {
            all.retain(|phase| phase.strong_count() > 0);
        }
        all.push(Arc::downgrade(&phase));
        phase
    }

    /// Ends the connection that has been idle longest, if that is at least `right`. Returns whether it ended one.
    pub(crate) fn make_room(&self, right: Duration) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = all.iter().filter_map(Weak::upgrade).filter_map(|phase| Some((phase.idle_for()?, phase)));
        match idle.filter(|(idle, _)| *idle >= right).max_by_key(|(idle, _)| *idle) {
            Some((_, phase)) => phase.makes_room.notify_one(),
            None => return false,
        }
        true
    }
}

/// A stream that notes when a request begins to arrive, and fails when the client does not take an answer in time:
/// within `time`, and a second more for each [`SLOWEST`] bytes, from the answer's first byte to the flush after its
/// last.
pub(crate) struct WatchedStream<S> {
    stream: S,
    phase: Arc<Phase>,
    time: Duration,
    answer: Option<Answer>,
}

/// The answer being written.
struct Answer {
    since: Instant,
    taken: u64,
    /// Runs while the client takes nothing.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<S> WatchedStream<S> {
    pub(crate) fn new(stream: S, phase: Arc<Phase>, time: Duration) -> WatchedStream<S> {
        WatchedStream { stream, phase, time, answer: None }
    }

    /// Turns the result of a write into an error if the answer is late.
    fn bounded(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let begin = || Answer { since: Instant::now(), taken: 0, sleep: None };
        let answer = self.answer.get_or_insert_with(begin);
        if let Poll::Ready(Ok(count)) = &written {
            answer.taken += *count as u64;
            answer.sleep = None;
        }
        let deadline = answer.since + self.time + Duration::from_secs(answer.taken / SLOWEST);
        let late = || Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not take its answer")));
        match written {
            // A client that takes a byte now and then never leaves a write pending for long.
            Poll::Ready(Ok(_)) if Instant::now() > deadline => late(),
            Poll::Pending => {
                let sleep = answer.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                if sleep.as_mut().poll(context).is_ready() { late() } else { Poll::Pending }
            }
            written => written,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WatchedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buf))?;
        if buf.filled().len() > before && self.phase.get() == Step::Idle {
            self.phase.set(Step::Head);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WatchedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, buf);
        self.bounded(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bufs);
        self.bounded(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Called when all of an answer has been written.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.answer = None;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Read;

    use tokio::net::UnixStream;

    use super::*;

    const TIME: Duration = Duration::from_secs(1);

    fn watched() -> (WatchedStream<UnixStream>, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stream = UnixStream::from_std(ours).unwrap();
        (WatchedStream::new(stream, Connections::default().add(), TIME), theirs)
    }

    /// Writes an answer as hyper does.
    async fn answer(stream: &mut WatchedStream<UnixStream>, bytes: usize) -> io::Result<()> {
        let bytes = vec![0; bytes];
        let mut left = &bytes[..];
        while !left.is_empty() {
            let count = poll_fn(|context| Pin::new(&mut *stream).poll_write(context, left)).await?;
            left = &left[count..];
        }
        poll_fn(|context| Pin::new(&mut *stream).poll_flush(context)).await
    }

    /// An answer of 1 MiB to a client that takes this many bytes at a time, with pauses.
    async fn taken(at_once: usize, pause: Duration) -> io::Result<()> {
        let (mut stream, mut theirs) = watched();
        std::thread::spawn(move || {
            let mut buffer = vec![0; at_once];
            while theirs.read(&mut buffer).is_ok_and(|count| count > 0) {
                std::thread::sleep(pause);
            }
        });
        answer(&mut stream, 1 << 20).await
    }

    #[test]
    fn an_answer_is_taken_in_time_or_not_at_all() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let byte_by_byte = taken(1, Duration::from_millis(5)).await.unwrap_err();
            assert_eq!(byte_by_byte.kind(), io::ErrorKind::TimedOut);
            let never = taken(1, Duration::from_secs(30)).await.unwrap_err();
            assert_eq!(never.kind(), io::ErrorKind::TimedOut);
            // Twice as long as a small answer may take, but with progress.
            taken(4096, TIME / 128).await.unwrap();
            // The time is that of one answer, not of the connection.
            let (mut stream, theirs) = watched();
            for _ in 0..4 {
                answer(&mut stream, 64).await.unwrap();
                tokio::time::sleep(TIME / 2).await;
            }
            drop(theirs);
        });
    }

    #[test]
    fn the_connection_that_is_idle_longest_makes_room() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let connections = Connections::default();
            let all: Vec<Arc<Phase>> = (0..3).map(|_| connections.add()).collect();
            all[0].set(Step::Busy);
            tokio::time::sleep(Duration::from_millis(20)).await;
            all[2].set(Step::Idle);
            assert!(!connections.make_room(Duration::from_secs(3600)));
            assert!(connections.make_room(Duration::from_millis(10)));
            all[1].ends().await;
            // A connection that got a request meanwhile stays.
            assert!(connections.make_room(Duration::ZERO));
            all.iter().for_each(|phase| phase.set(Step::Busy));
            assert!(!connections.make_room(Duration::ZERO));
            let ends = all.iter().map(|phase| phase.ends());
            for end in ends {
                assert!(tokio::time::timeout(Duration::from_millis(5), end).await.is_err());
            }
        });
    }
}
