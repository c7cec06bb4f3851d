//! Cold pools in object stores, through the `object_store` crate: s3, gs, az, http(s) and (for tests) file. Credentials
//! and endpoints come from the environment, as the crate reads them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, …).
//!
//! Every reader has its own runtime and client. They make progress only while a thread waits for them.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart, path};
use tokio::runtime::Runtime;

use crate::snapshot::{Chain, Digest, PageSet, SnapshotId};
use crate::sys::bounded_wait::Wait;
use crate::sys::worker;
use crate::tiering::cold::store::{Checked, MANIFEST, Manifest, OBJECTS, Store, object_names};
use crate::tiering::cold::{Broken, ChunkError, ChunkSource, EachChunk, Flow, Index, Packed, Place, SourceCounters};

/// Most bytes read by one request, and the number of concurrent requests.
const READ_BYTES: u64 = 1 << 20;
const READS: usize = 8;
/// Bytes of a part of an upload, and the number of concurrent parts.
const PART_BYTES: usize = 8 << 20;
const PARTS: usize = 4;
/// Time for a store to answer for a small object when a pool is made or changed.
const ADMIN_TIME: Duration = Duration::from_secs(60);

/// A store, the pool's path in it, and the runtime that waits for its answers.
struct Client {
    /// The pool's URL.
    name: String,
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
    prefix: path::Path,
    patience: Duration,
}

impl Client {
    /// The client for a pool's URL. Sends no request yet.
    fn new(url: &str, patience: Duration) -> Result<Client, String> {
        let failed = |what: &dyn std::fmt::Display| format!("it cannot be used: {what}");
        // An error means that a provider is installed already: the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let parsed = url::Url::parse(url).map_err(|error| failed(&error))?;
        let seconds = format!("{} ms", patience.as_millis());
        let own =
            [("timeout", seconds.clone()), ("connect_timeout", seconds)].map(|(key, value)| (key.to_string(), value));
        let options = std::env::vars().chain(own);
        let (store, prefix) = object_store::parse_url_opts(&parsed, options).map_err(|error| failed(&error))?;
        let runtime = worker::runtime(tokio::runtime::Builder::new_current_thread().enable_all());
        let name = url.to_string();
        Ok(Client { name, runtime: runtime.map_err(|error| failed(&error))?, store, prefix, patience })
    }

    fn path(&self, name: &str) -> path::Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Waits for a whole answer within the time limit: single bytes of it do not prolong the wait.
    fn wait<T>(&self, answer: impl Future<Output = object_store::Result<T>>) -> Result<T, Broken> {
        let mut wait = Wait::new(self.name.as_str(), self.patience);
        match self.runtime.block_on(async { wait.answered(answer).await }) {
            Some(result) => result.map_err(broken),
            None => Err(Broken::Transient(format!("it has not answered for {} s", self.patience.as_secs_f64()))),
        }
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Broken> {
        let path = self.path(name);
        let answer = async { self.store.get(&path).await?.bytes().await };
        self.wait(answer).map(|bytes| bytes.to_vec())
    }
}

/// A refusal by the store is permanent; other failures may be transient.
fn broken(error: object_store::Error) -> Broken {
    use object_store::Error::*;
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    let what: String =
        format!("{error}{cause}").chars().map(|c| if c.is_control() { ' ' } else { c }).take(600).collect();
    match error {
        NotFound { .. } => Broken::Refused(format!("the object is missing: {what}")),
        PermissionDenied { .. } | Unauthenticated { .. } | NotSupported { .. } | NotImplemented { .. } => {
            Broken::Refused(what)
        }
        _ => Broken::Transient(what),
    }
}

/// An object store as a place that readers fetch from.
pub struct ObjectPlace {
    url: String,
    patience: Duration,
}

impl ObjectPlace {
    pub fn new(url: String, patience: Duration) -> ObjectPlace {
        ObjectPlace { url, patience }
    }

    fn client(&self) -> Result<Client, Broken> {
        Client::new(&self.url, self.patience).map_err(Broken::Refused)
    }
}

impl Place for ObjectPlace {
    fn name(&self) -> &str {
        &self.url
    }

    fn index(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.round_trips.fetch_add(1, Ordering::Relaxed);
        self.client()?.get(&object_names(snapshot).0)
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        counters.connections.fetch_add(1, Ordering::Relaxed);
        let client = self.client()?;
        if digest.0 != *blake3::hash(&client.get(&object_names(index.snapshot()).0)?).as_bytes() {
            return Err(Broken::Refused("it holds another packing of the snapshot".to_string()));
        }
        let data = client.path(&object_names(index.snapshot()).1);
        Ok(Box::new(ObjectSource { client, data, index: index.clone(), counters }))
    }
}

struct ObjectSource {
    client: Client,
    data: path::Path,
    index: Arc<Index>,
    counters: Arc<SourceCounters>,
}

impl ChunkSource for ObjectSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        let ObjectSource { client, data, index, counters } = self;
        let spans = index.spans(wanted, READ_BYTES);
        counters.requests.fetch_add(spans.len() as u64, Ordering::Relaxed);
        counters.round_trips.fetch_add(1, Ordering::Relaxed);
        let store = &client.store;
        let requests = spans.iter().map(|span| store.get_range(data, index.span(span.clone())));
        // Answers in order, while the next requests are under way.
        let mut answers = futures_util::stream::iter(requests).buffered(READS);
        for span in &spans {
            let next = async { answers.try_next().await };
            let Some(bytes) = client.wait(next)? else { break };
            let range = index.span(span.clone());
            if bytes.len() as u64 != range.end - range.start {
                return Err(Broken::Damaged("its data object has been cut off".to_string()));
            }
            if index.deliver(span.clone(), &bytes, each)? == Flow::Stop {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A pool in an object store, to be filled and listed.
pub struct ObjectPool {
    url: String,
    client: Client,
    manifest: Manifest,
}

fn failed(url: &str, broken: Broken) -> ChunkError {
    let (Broken::Transient(why) | Broken::Damaged(why) | Broken::Refused(why)) = broken;
    ChunkError::ObjectStore { url: url.to_string(), why }
}

impl ObjectPool {
    /// Makes a pool where none exists.
    pub fn create(url: &str, manifest: Manifest) -> Result<ObjectPool, ChunkError> {
        let client = Client::new(url, ADMIN_TIME).map_err(|why| failed(url, Broken::Refused(why)))?;
        match client.get(MANIFEST) {
            Err(Broken::Refused(_)) => {}
            Ok(_) => return Err(ChunkError::CannotMake { path: url.into(), problem: "there is a cold pool already" }),
            Err(broken) => return Err(failed(url, broken)),
        }
        let put = async { client.store.put(&client.path(MANIFEST), manifest.to_bytes().into()).await };
        client.wait(put).map_err(|broken| failed(url, broken))?;
        Ok(ObjectPool { url: url.to_string(), client, manifest })
    }

    /// # Errors
    /// [`ChunkError::ObjectStore`] if the pool is not there, and the errors of [`Manifest::parse`].
    pub fn open(url: &str) -> Result<ObjectPool, ChunkError> {
        let client = Client::new(url, ADMIN_TIME).map_err(|why| failed(url, Broken::Refused(why)))?;
        let bytes = client.get(MANIFEST).map_err(|broken| failed(url, broken))?;
        Ok(ObjectPool { url: url.to_string(), client, manifest: Manifest::parse(Path::new(url), &bytes)? })
    }

    pub fn manifest(&self) -> Manifest {
        self.manifest
    }

    /// Packs the tip of `chain` in a directory of this host (`TMPDIR`), and uploads it. The data goes first, so that an
    /// object with an index is complete.
    pub fn add(
        &self,
        chain: &Chain,
        hot: Option<PageSet>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed, ChunkError> {
        let scratch = std::env::temp_dir().join(format!("tvmm-pack-{}-{}", std::process::id(), chain.tip().id()));
        let added = self.add_through(chain, hot, &scratch, progress);
        // Best effort: the scratch files are not needed any more.
        let _ = std::fs::remove_dir_all(&scratch);
        added
    }

    fn add_through(
        &self,
        chain: &Chain,
        hot: Option<PageSet>,
        scratch: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed, ChunkError> {
        let snapshot = chain.tip().id();
        if self.list()?.contains(&snapshot) {
            return Err(ChunkError::AlreadyHeld { path: self.url.as_str().into(), snapshot });
        }
        let local = Store::create(scratch, self.manifest)?;
        let packed = local.add(chain, hot, None, progress)?;
        let (index, data) = object_names(snapshot);
        self.upload(&local.data_path(snapshot), &data)?;
        let bytes = local.index_bytes(snapshot)?;
        let put = async { self.client.store.put(&self.client.path(&index), PutPayload::from(bytes)).await };
        self.client.wait(put).map_err(|broken| failed(&self.url, broken))?;
        Ok(packed)
    }

    /// Uploads in parts; each may take as long as an answer.
    fn upload(&self, from: &Path, name: &str) -> Result<(), ChunkError> {
        let wait = |broken| failed(&self.url, broken);
        let mut file = std::fs::File::open(from).map_err(ChunkError::file("open", from))?;
        let client = &self.client;
        let path = self.client.path(name);
        let len = file.metadata().map_err(ChunkError::file("inspect", from))?.len();
        let mut part = vec![0; PART_BYTES.min(len as usize)];
        if len <= PART_BYTES as u64 {
            file.read_exact(&mut part).map_err(ChunkError::file("read", from))?;
            let put = async { client.store.put(&path, PutPayload::from(part)).await };
            return client.wait(put).map(drop).map_err(wait);
        }
        let upload = client.wait(async { client.store.put_multipart(&path).await }).map_err(wait)?;
        let mut write = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        loop {
            let read = file.read(&mut part).map_err(ChunkError::file("read", from))?;
            if read == 0 {
                break;
            }
            // Parts are sent by tasks of the runtime.
            let sent = async {
                write.write(&part[..read]);
                write.wait_for_capacity(PARTS).await
            };
            client.wait(sent).map_err(wait)?;
        }
        client.wait(async { write.finish().await }).map(drop).map_err(wait)
    }

    /// The snapshots in the pool, in the order of their ids.
    pub fn list(&self) -> Result<Vec<SnapshotId>, ChunkError> {
        let prefix = self.client.path(OBJECTS);
        let answer = async { self.client.store.list(Some(&prefix)).try_collect::<Vec<_>>().await };
        let entries = self.client.wait(answer).map_err(|broken| failed(&self.url, broken))?;
        let named = |entry: &object_store::ObjectMeta| entry.location.filename()?.strip_suffix(".index")?.parse().ok();
        let mut held: Vec<SnapshotId> = entries.iter().filter_map(named).collect();
        held.sort_unstable();
        Ok(held)
    }

    pub fn index(&self, snapshot: SnapshotId) -> Result<Index, ChunkError> {
        let name = object_names(snapshot).0;
        let bytes = self.client.get(&name).map_err(|broken| failed(&self.url, broken))?;
        Index::parse(&format!("{}/{name}", self.url), bytes, snapshot)
    }

    /// Removes data objects without an index, which an interrupted upload leaves behind. The caller makes sure that no
    /// upload is running. Returns the bytes freed.
    pub fn collect(&self) -> Result<u64, ChunkError> {
        let held = self.list()?;
        let wait = |broken| failed(&self.url, broken);
        let prefix = self.client.path(OBJECTS);
        let answer = async { self.client.store.list(Some(&prefix)).try_collect::<Vec<_>>().await };
        let mut freed = 0;
        for entry in self.client.wait(answer).map_err(wait)? {
            let of = entry.location.filename().and_then(|name| name.strip_suffix(".chunks")?.parse().ok());
            if of.is_some_and(|id: SnapshotId| !held.contains(&id)) {
                self.client.wait(async { self.client.store.delete(&entry.location).await }).map_err(wait)?;
                freed += entry.size;
            }
        }
        Ok(freed)
    }

    /// Compares every chunk of a snapshot with its checksum.
    pub fn check(&self, snapshot: SnapshotId) -> Result<Checked, ChunkError> {
        let index = self.index(snapshot)?;
        let data = self.client.path(&object_names(snapshot).1);
        let mut checked = Checked::default();
        let all: Vec<u32> = (0..index.chunks().len() as u32).collect();
        for span in index.spans(&all, READ_BYTES) {
            let read = async { self.client.store.get_range(&data, index.span(span.clone())).await };
            let bytes = self.client.wait(read).map_err(|broken| failed(&self.url, broken))?;
            let range = index.span(span.clone());
            if bytes.len() as u64 != range.end - range.start {
                return Err(failed(&self.url, Broken::Damaged("its data object has been cut off".to_string())));
            }
            let noted = index.deliver(span, &bytes, &mut |number, stored| {
                checked.note(number, crc32c::crc32c(stored) == index.chunks()[number as usize].checksum);
                Ok(Flow::Continue)
            });
            noted.map_err(|broken| failed(&self.url, broken))?;
        }
        Ok(checked)
    }

    /// Takes a snapshot out, its index first. VMs that run from it cannot go on.
    pub fn remove(&self, snapshot: SnapshotId) -> Result<(), ChunkError> {
        let (index, data) = object_names(snapshot);
        for name in [index, data] {
            let path = self.client.path(&name);
            let delete = async { self.client.store.delete(&path).await };
            self.client.wait(delete).map_err(|broken| failed(&self.url, broken))?;
        }
        Ok(())
    }
}
