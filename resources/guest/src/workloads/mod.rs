//! The twelve functions with which serverless research measures restores (FaaSnap's set: FunctionBench and two that
//! only touch memory), written anew: the computation is real, the inputs are made here. docs/functions.md has all
//! parameters and their sources.
//!
//! [`State::prepare`] makes the memory that a real function has before its snapshot (a runtime, inputs, weights), which
//! stays. The memory of an invocation ([`State::invoke`]) is given back.

mod aes;
mod graph;
mod image;
mod interpreter;
mod json;
mod lists;
mod matrix;
mod network;
mod random;
mod runtime;
mod table;
mod video;
mod zip;

use alloc::vec::Vec;

use crate::args::Message;
use crate::digest::{Digest, mix2};
use crate::message;
use network::Weights;
use runtime::{Pace, Runtime, Tally, Touches};

pub use runtime::DEFAULT_MIB as RUNTIME_MIB;

const MIB: u64 = 1 << 20;

/// The input of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The smaller of the two usual inputs.
    A,
    /// The larger one.
    B,
    /// An input of another size, in the function's unit.
    Size(u64),
}

impl Input {
    /// A number that no other input has.
    fn key(self) -> u64 {
        match self {
            Self::A => mix2(0, 1),
            Self::B => mix2(0, 2),
            Self::Size(size) => mix2(1, size),
        }
    }

    /// The input's size, if A and B have these sizes.
    fn size(self, a: u64, b: u64) -> u64 {
        match self {
            Self::A => a,
            Self::B => b,
            Self::Size(size) => size,
        }
    }
}

/// One of the twelve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hello,
    ReadList,
    Mmap,
    Image,
    Json,
    PyAes,
    Chameleon,
    MatMul,
    Ffmpeg,
    Compression,
    Recognition,
    PageRank,
}

/// The facts known of a function before it runs.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    kind: Kind,
    /// Its touches of the runtime image.
    touches: Touches,
    /// Least and largest `size`; `None` if it has no other sizes.
    sizes: Option<(u64, u64)>,
}

impl Workload {
    /// Refuses a size that the function does not have.
    pub fn check_size(&self, size: Option<u64>) -> Result<(), Message> {
        match (self.sizes, size) {
            (_, None) => Ok(()),
            (None, Some(_)) => Err(message!("{} has no other sizes", self.name)),
            (Some((least, most)), Some(size)) if (least..=most).contains(&size) => Ok(()),
            (Some((least, most)), Some(size)) => Err(message!("size={size} is not in {least}..={most}")),
        }
    }
}

const fn workload(
    name: &'static str,
    kind: Kind,
    pages: u64,
    written_percent: u64,
    sizes: Option<(u64, u64)>,
) -> Workload {
    Workload { name, kind, touches: Touches { pages, written_percent }, sizes }
}

/// All of them. Sources of the numbers: docs/functions.md.
pub static WORKLOADS: &[Workload] = &[
    workload("hello", Kind::Hello, 2048, 35, None),
    workload("readlist", Kind::ReadList, 2304, 35, Some((1, 16 << 10))),
    workload("mmap", Kind::Mmap, 2304, 35, Some((1, 16 << 10))),
    workload("image", Kind::Image, 3584, 30, Some((4_000, 16_000_000))),
    workload("json", Kind::Json, 2560, 50, Some((json::BYTES_MIN, 64_000_000))),
    workload("pyaes", Kind::PyAes, 2560, 50, Some((16, 1_000_000))),
    workload("chameleon", Kind::Chameleon, 3584, 50, Some((1, 4_000_000))),
    workload("matmul", Kind::MatMul, 4096, 25, Some((1, 8000))),
    workload("ffmpeg", Kind::Ffmpeg, 6144, 20, Some((8_000, 16_000_000))),
    workload("compression", Kind::Compression, 2304, 35, Some((json::BYTES_MIN, 64_000_000))),
    workload("recognition", Kind::Recognition, 6144, 25, Some((4_000, 16_000_000))),
    workload("pagerank", Kind::PageRank, 3584, 40, Some((20, 4_000_000))),
];

/// The function of this name.
pub fn find(name: &str) -> Option<&'static Workload> {
    WORKLOADS.iter().find(|workload| workload.name == name)
}

/// The result of an invocation.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub digest: u64,
    /// Amount of output or of input, in a unit of the function's: bytes, elements, nodes, a class.
    pub result: u64,
    /// Pages of the runtime image that were read and written.
    pub runtime: (u64, u64),
}

/// The memory made before the snapshot.
pub struct State {
    runtime: Option<(u64, Runtime)>,
    inputs: Vec<(Kind, Input, Vec<u8>)>,
    list: Option<(u64, Vec<u64>)>,
    weights: Option<Weights>,
}

impl State {
    pub const fn new() -> Self {
        Self { runtime: None, inputs: Vec::new(), list: None, weights: None }
    }

    /// Upper bound of the bytes that `prepare` with the same arguments needs, including those that it gives back.
    pub fn prepare_needs(&self, workload: &Workload, runtime_mib: Option<u64>, size: Option<u64>) -> u64 {
        let runtime = if self.runtime.is_some() { 0 } else { runtime_mib.unwrap_or(RUNTIME_MIB) * MIB };
        let own = match workload.kind {
            Kind::ReadList if self.list.is_none() => size.unwrap_or(lists::MIB) * MIB,
            Kind::Recognition => Weights::count() as u64 * 4 + image_needs(size.unwrap_or(0).max(300_000)),
            Kind::Image => image_needs(size.unwrap_or(0).max(300_000)),
            Kind::Ffmpeg => 16 * MIB + 16 * size.unwrap_or(0),
            Kind::Json | Kind::Compression => 3 * size.unwrap_or(0),
            _ => 0,
        };
        runtime + own + MIB
    }

    /// Makes the runtime image (of `runtime_mib` MiB, 0 for none) and the inputs of `workload`: A and B, and the one of
    /// `size`. Keeps those that exist already.
    pub fn prepare(&mut self, workload: &Workload, runtime_mib: Option<u64>, size: Option<u64>) -> Result<(), Message> {
        workload.check_size(size)?;
        match (&self.runtime, runtime_mib) {
            (Some((mib, _)), Some(asked)) if *mib != asked => {
                return Err(message!("the runtime image has {mib} MiB already, not {asked}"));
            }
            (Some(_), _) => {}
            (None, asked) => {
                let mib = asked.unwrap_or(RUNTIME_MIB);
                self.runtime = Some((mib, Runtime::new(mib)));
            }
        }
        match workload.kind {
            Kind::ReadList => return self.prepare_list(size.unwrap_or(lists::MIB)),
            Kind::Recognition if self.weights.is_none() => self.weights = Some(Weights::random(mix2(50, 0))),
            _ => {}
        }
        let wanted = [Some(Input::A), Some(Input::B), size.map(Input::Size)];
        for input in wanted.into_iter().flatten() {
            let kind = input_of(workload.kind);
            if self.input(kind, input).is_none()
                && let Some(bytes) = make_input(kind, input)?
            {
                self.inputs.push((kind, input, bytes));
            }
        }
        Ok(())
    }

    fn prepare_list(&mut self, mib: u64) -> Result<(), Message> {
        match &self.list {
            Some((there, _)) if *there != mib => Err(message!("the list has {there} MiB already, not {mib}")),
            Some(_) => Ok(()),
            None => {
                self.list = Some((mib, lists::build(mib)));
                Ok(())
            }
        }
    }

    /// Bytes made by `prepare`.
    pub fn bytes(&self) -> u64 {
        let runtime = self.runtime.as_ref().map_or(0, |(_, runtime)| runtime.pages() * crate::PAGE_SIZE);
        let inputs: usize = self.inputs.iter().map(|(_, _, bytes)| bytes.len()).sum();
        let list = self.list.as_ref().map_or(0, |(mib, _)| mib * MIB);
        runtime + inputs as u64 + list + self.weights.as_ref().map_or(0, Weights::bytes)
    }

    fn input(&self, kind: Kind, input: Input) -> Option<&[u8]> {
        let found = self.inputs.iter().find(|(of, which, _)| (*of, *which) == (kind, input));
        found.map(|(_, _, bytes)| &bytes[..])
    }

    /// Upper bound of the bytes that `invoke` with the same arguments needs.
    pub fn invoke_needs(&self, workload: &Workload, input: Input) -> u64 {
        let size = |a, b| input.size(a, b);
        MIB + match workload.kind {
            Kind::Hello | Kind::ReadList => 0,
            Kind::Mmap => size(lists::MIB, lists::MIB) * MIB,
            Kind::Image => image_needs(size(image::A.bytes, 300_000)),
            Kind::Json => 50 * size(json::BYTES_A, json::BYTES_B),
            Kind::PyAes => 100 * size(aes::BYTES_A, aes::BYTES_B) + MIB,
            Kind::Chameleon => {
                let shape = table_shape(input);
                1000 * shape.rows * shape.columns + MIB
            }
            Kind::MatMul => {
                let n = size(MATMUL_A, MATMUL_B);
                3 * 8 * n * n + 8 * MIB
            }
            Kind::Ffmpeg => 16 * MIB + 16 * size(video::BYTES_A, video::BYTES_B),
            Kind::Compression => 6 * size(json::BYTES_A, json::BYTES_B) + 2 * MIB,
            Kind::Recognition => 64 * MIB + image_needs(size(image::A.bytes, 300_000)),
            Kind::PageRank => 400 * size(graph::NODES_A, graph::NODES_B),
        }
    }

    /// Runs a function once.
    pub fn invoke(&mut self, workload: &Workload, input: Input) -> Result<Outcome, Message> {
        if let Input::Size(size) = input {
            workload.check_size(Some(size))?;
        }
        let Self { runtime, inputs, list, weights } = self;
        let mut name = Digest::new();
        name.bytes(workload.name.as_bytes());
        let runtime = runtime.as_mut().map(|(_, runtime)| runtime);
        let mut pace = Pace::begin(runtime, workload.touches, name.finish(), input.key());
        // As a request's body arrives: a copy in memory of its own.
        let received = || {
            let kind = input_of(workload.kind);
            let found = inputs.iter().find(|(of, which, _)| (*of, *which) == (kind, input));
            found.map(|(_, _, bytes)| bytes.clone()).ok_or_else(|| not_prepared(workload, input))
        };
        let seed = mix2(name.finish(), input.key());
        let (digest, result) = match workload.kind {
            Kind::Hello => (mix2(name.finish(), 0), 0),
            Kind::ReadList => read_list(list.as_ref(), workload, input, &mut pace)?,
            Kind::Mmap => {
                let mib = input.size(lists::MIB, lists::MIB);
                (lists::store(mib, seed, &mut pace), mib * MIB / crate::PAGE_SIZE)
            }
            Kind::Image => image::run(&received()?, &mut pace)?,
            Kind::Json => {
                let document = received()?;
                pace.at(1, 2);
                of_bytes(&json::pretty(&document)?)
            }
            Kind::PyAes => {
                let bytes = input.size(aes::BYTES_A, aes::BYTES_B);
                (aes::run(bytes, seed, &mut pace)?, bytes)
            }
            Kind::Chameleon => of_bytes(table::render(table_shape(input), &mut pace)?.as_bytes()),
            Kind::MatMul => {
                let n = input.size(MATMUL_A, MATMUL_B);
                (matrix::matmul(n, seed, &mut pace), n)
            }
            Kind::Ffmpeg => video::run(&received()?, &mut pace)?,
            Kind::Compression => {
                let document = received()?;
                pace.at(1, 2);
                of_bytes(&zip::archive("input.json", &document))
            }
            Kind::Recognition => {
                let weights = weights.as_ref().ok_or_else(|| not_prepared(workload, input))?;
                network::run(weights, &received()?, &mut pace)?
            }
            Kind::PageRank => {
                let nodes = input.size(graph::NODES_A, graph::NODES_B);
                (graph::run(nodes, seed, &mut pace), nodes)
            }
        };
        let Tally { digest: seen, read, written } = pace.end();
        Ok(Outcome { digest: mix2(digest, seen.finish()), result, runtime: (read, written) })
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

const MATMUL_A: u64 = 1100;
const MATMUL_B: u64 = 1200;

fn table_shape(input: Input) -> table::Shape {
    match input {
        Input::A => table::A,
        Input::B => table::B,
        Input::Size(cells) => table::Shape::of_cells(cells),
    }
}

/// The bytes of a picture of `bytes` bytes of JPEG, of two more of the same size, and of the encoded files.
fn image_needs(bytes: u64) -> u64 {
    60 * bytes + 8 * MIB
}

fn read_list(
    list: Option<&(u64, Vec<u64>)>,
    workload: &Workload,
    input: Input,
    pace: &mut Pace,
) -> Result<(u64, u64), Message> {
    let Some((mib, list)) = list else {
        return Err(not_prepared(workload, input));
    };
    let first = match input {
        Input::A => 0,
        Input::B => crate::PAGE_WORDS as usize / 2,
        Input::Size(size) if size == *mib => 0,
        Input::Size(size) => return Err(message!("the list has {mib} MiB, not {size}")),
    };
    Ok((lists::read(list, first, pace), mib * MIB / crate::PAGE_SIZE))
}

/// `compression` takes the inputs of `json`, `recognition` those of `image`.
fn input_of(kind: Kind) -> Kind {
    match kind {
        Kind::Compression => Kind::Json,
        Kind::Recognition => Kind::Image,
        other => other,
    }
}

/// The bytes of an input; `None` if the function makes its input itself.
fn make_input(kind: Kind, input: Input) -> Result<Option<Vec<u8>>, Message> {
    let seed = input.key();
    Ok(match kind {
        Kind::Json => Some(json::document(input.size(json::BYTES_A, json::BYTES_B), seed)),
        Kind::Image => {
            let shape = match input {
                Input::A => image::A,
                Input::B => image::B,
                Input::Size(bytes) => image::Shape::of_bytes(bytes),
            };
            Some(image::prepare(shape, seed)?)
        }
        Kind::Ffmpeg => {
            let bytes = input.size(video::BYTES_A, video::BYTES_B);
            let frames = if let Input::Size(bytes) = input { video::frames_of(bytes) } else { video::FRAMES };
            Some(video::prepare(frames, video::TIMES * bytes, seed)?)
        }
        _ => None,
    })
}

fn not_prepared(workload: &Workload, input: Input) -> Message {
    let name = workload.name;
    match input {
        Input::Size(size) => message!("not prepared: run prepare function={name} size={size} first"),
        _ => message!("not prepared: run prepare function={name} first"),
    }
}

fn of_bytes(bytes: &[u8]) -> (u64, u64) {
    let mut digest = Digest::new();
    digest.bytes(bytes);
    (digest.finish(), bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes that run quickly even without optimisation.
    const SMALL: [(&str, u64); 10] = [
        ("readlist", 1),
        ("mmap", 1),
        ("image", 5_000),
        ("json", 3_000),
        ("pyaes", 500),
        ("chameleon", 100),
        ("matmul", 50),
        ("ffmpeg", 8_000),
        ("compression", 3_000),
        ("pagerank", 500),
    ];

    #[test]
    fn digest_depends_on_the_input_and_not_on_earlier_runs() {
        let mut state = State::new();
        for (name, size) in SMALL {
            state.prepare(find(name).unwrap(), Some(4), Some(size)).unwrap();
        }
        let mut digests = |inputs: &[(&str, Input)]| -> Vec<u64> {
            inputs.iter().map(|(name, input)| state.invoke(find(name).unwrap(), *input).unwrap().digest).collect()
        };
        let mut inputs: Vec<(&str, Input)> = SMALL.iter().map(|(name, size)| (*name, Input::Size(*size))).collect();
        inputs.extend([("hello", Input::A), ("json", Input::A), ("json", Input::B), ("compression", Input::A)]);
        let first = digests(&inputs);
        inputs.reverse();
        let mut again = digests(&inputs);
        again.reverse();
        assert_eq!(first, again);
        let different: std::collections::BTreeSet<u64> = first.iter().copied().collect();
        assert_eq!(different.len(), first.len());
    }

    #[test]
    fn missing_and_out_of_range_inputs_are_errors() {
        let mut state = State::new();
        let error = |result: Result<Outcome, Message>| result.unwrap_err().as_str().to_string();
        for name in ["readlist", "image", "json", "ffmpeg", "compression", "recognition"] {
            let message = error(state.invoke(find(name).unwrap(), Input::A));
            assert_eq!(message, format!("not prepared: run prepare function={name} first"));
        }
        state.prepare(find("json").unwrap(), Some(0), None).unwrap();
        let message = error(state.invoke(find("json").unwrap(), Input::Size(2000)));
        assert_eq!(message, "not prepared: run prepare function=json size=2000 first");
        assert!(error(state.invoke(find("matmul").unwrap(), Input::Size(0))).contains("not in 1..=8000"));
        assert!(error(state.invoke(find("hello").unwrap(), Input::Size(1))).contains("no other sizes"));
        assert!(state.prepare(find("json").unwrap(), Some(1), None).unwrap_err().as_str().contains("0 MiB already"));
        state.prepare(find("readlist").unwrap(), None, Some(1)).unwrap();
        assert!(state.prepare(find("readlist").unwrap(), None, Some(2)).is_err());
        assert!(error(state.invoke(find("readlist").unwrap(), Input::Size(2))).contains("1 MiB, not 2"));
        assert!(find("nothing").is_none());
    }

    #[test]
    fn preparing_twice_keeps_the_first_result() {
        let mut state = State::new();
        let json = find("json").unwrap();
        state.prepare(json, Some(1), Some(5000)).unwrap();
        let bytes = state.bytes();
        assert_eq!(bytes, MIB + json::BYTES_A + json::BYTES_B + 5000);
        state.prepare(json, None, Some(5000)).unwrap();
        state.prepare(find("compression").unwrap(), Some(1), None).unwrap();
        assert_eq!(state.bytes(), bytes);
    }
}
