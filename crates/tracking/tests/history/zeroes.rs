//! zeroes
