//! The delivery of chunks: the receiver of each, and the reasons why one does not come.

/// The reason why a place did not give a chunk or an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The place may give it next time: it could not be reached, was slow, went away.
    Transient(String),
    /// The place gave other bytes.
    Damaged(String),
    /// The place will not give it: it does not have it, or speaks another protocol.
    Refused(String),
}

/// The receiver's answer: more chunks are wanted, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    Stop,
}

/// Called by a source with the number and the stored bytes of each chunk; answers whether more are wanted.
pub type EachChunk<'a> = dyn FnMut(u32, &[u8]) -> Result<Flow, Broken> + 'a;
