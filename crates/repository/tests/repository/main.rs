//! The repository over a simulated store: truth models, crashes, damage, late listings, jumping clocks.

mod care;
mod damage;
mod keys;
mod seeds;
mod sessions;
mod simulation;
