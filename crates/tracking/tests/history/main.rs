//! Histories on storages that lose what was not synced, and on such that fail.

mod crashes;
mod faults;
mod host;
mod points;
mod views;
mod zeroes;
