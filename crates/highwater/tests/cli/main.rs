//! The real binary, judged by qemu-img and real NBD clients.

mod audit;
mod backup;
mod backup_random;
mod bitmaps;
mod chain;
mod changes;
mod daemon;
mod freeze;
mod images;
mod jobs;
mod kill_steps;
mod live_disks;
mod long_work;
mod marks;
mod relocate;
mod relocate_kill;
mod repo;
mod safety;
mod scripted_agent;
mod serve;
mod snapshots;
mod support;
mod tree;
mod views;
