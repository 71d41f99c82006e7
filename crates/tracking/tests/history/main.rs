//! Histories on storages that lose what was not synced, and on such that fail.

mod answers;
mod conformance;
mod crashes;
mod damage;
mod faults;
mod groups;
mod heirs;
mod host;
mod orders;
mod parking;
mod points;
mod resealed;
mod sizes;
mod views;
mod zeroes;
