//! The program `mica`.

fn main() {}
