//! The NBD server: disks to QEMU guests and every other NBD client.
//!
//! ```text
//! Server ── listeners ── handshake (any I/O thread; `negotiation`, no I/O)
//!              │             │ after NBD_OPT_GO the connection moves to the disk's home thread
//!              │         session: reader ─► request (`judge`) ─► `execute` on the disk ─► reply ─► writer
//!              └─ Export: name, home thread, and how the disk is found there
//! ```
//!
//! What is on the wire is in `wire`, what is wrong with a request in `request`, what is answered in `reply`,
//! and the only mapping of errors in `errors`. Untrusted bytes meet only these before they are judged.
//!
//! Invariants: a disk is touched on its home thread alone; a connection's memory is bounded; a request that
//! has reached the disk is finished, whatever becomes of its connection.

mod connection;
mod context;
mod errors;
mod execute;
mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshake;
#[cfg(any(test, fuzzing))]
mod memory_disk;
mod negotiation;
mod occasional;
mod options;
mod reply;
mod request;
mod server;
mod session;
mod stats;
mod stream;
mod tls;
mod wire;

pub use connection::ConnectionInfo;
pub use context::{ContextSource, MetaContext, StatusRun};
pub use export::{DiskSource, Export};
pub use server::{Drained, ExportError, Server, ServerConfig};
pub use stats::{ExportStats, LATENCY_BUCKETS, RequestKind, RequestStats};
pub use tls::{Tls, TlsError, TlsIdentity};
