//! What the qcow2 targets share, and [`history`]: how an input becomes an image and a row of operations, and what is done to it.
//!
//! Input: mode, flags, number of operations, operations of 6 bytes, and then the image itself (mode 0) or
//! changes to one of the images of [`bases`] (other modes). So the mutator reaches deep states either way.

pub mod bases;
mod history;
mod input;
pub mod seeds;
mod work;

pub use history::history;
pub use input::{Input, Op};
pub use work::{check_and_repair, look, work};
