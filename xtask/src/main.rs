//! Maintenance tasks: `cargo run --release --package xtask -- peers` measures mica against other programs.

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
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Peers(peers) => peers.run(),
    }
}
