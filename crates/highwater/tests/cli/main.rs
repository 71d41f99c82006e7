//! The real binary, judged by qemu-img and real NBD clients.

mod daemon;
mod images;
mod live_disks;
mod long_work;
mod safety;
mod serve;
mod support;
