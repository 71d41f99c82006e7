//! The real binary, judged by qemu-img and real NBD clients.

mod daemon;
mod images;
mod serve;
mod support;
