//! Maintenance tasks: measuring mica, alone and against other programs.
//!
//! `cargo run --release --package xtask -- peers --help`

mod growth;
mod instructions;
mod micro;
mod peers;
mod table;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run mica and other programs alternately on the same shapes, and write a table with the ratios
    Peers(peers::Peers),
    /// Time single ops, or compiled chains of ops, against torch and NumPy, and write a table with the ratios
    Micro(micro::Micro),
    /// Count what a node of a graph costs in instructions, under valgrind
    Instructions(instructions::Instructions),
    /// Measure how cost grows with depth, length, batch and size, and draw it
    Growth(growth::Growth),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Peers(peers) => peers.run(),
        Task::Micro(micro) => micro.run(),
        Task::Instructions(instructions) => instructions.run(),
        Task::Growth(growth) => growth.run(),
    }
}
