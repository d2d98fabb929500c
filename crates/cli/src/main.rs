//! The program `mica`: one file per command, thin over the libraries.
//!
//! Results go to stdout, progress and logs to stderr. `--json` prints exactly one JSON document on
//! stdout. Exit codes are in [`exit`].

mod commands;
mod exit;
mod live;
mod machine;
mod output;
mod signals;
mod training;

use clap::{CommandFactory, Parser, Subcommand};

/// Run, fine-tune, quantize and serve language models on this machine.
#[derive(Parser)]
#[command(name = "mica", version, about, max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    /// How many threads compute [default: MICA_THREADS, or the cores of this machine]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Most memory that this process may take: 8GB, 500MB, or bytes [default: what the machine has]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    memory_limit: Option<u64>,

    #[command(subcommand)]
    command: Command,
}

/// A number of bytes with or without a unit; as for memory chips, K, M and G are powers of 1000 and Ki, Mi and Gi of
/// 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("expected a size such as 8GB, 500MB or 2GiB, got {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| bad())?;
    let unit = match text[digits..].trim().trim_end_matches(['B', 'b']).to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024.0 * 1024.0,
        "gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(bad()),
    };
    let bytes = number * unit;
    if !(1e6..1e18).contains(&bytes) {
        return Err(format!("{text:?} is {bytes} bytes; give a unit, as in 8GB, and at least 1MB"));
    }
    Ok(bytes as u64)
}

#[derive(Subcommand)]
enum Command {
    Quickstart(commands::quickstart::Args),
    Generate(commands::generate::Args),
    Chat(commands::chat::Args),
    Train(commands::train::Args),
    Lora(commands::lora::Args),
    Fuse(commands::fuse::Args),
    Convert(commands::convert::Args),
    Perplexity(commands::perplexity::Args),
    Logits(commands::logits::Args),
    Bench(commands::bench::Args),
    Doctor(commands::doctor::Args),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> std::process::ExitCode {
    // A reader that goes away (`mica … | head`) ends the program as it ends others.
    exit::restore_broken_pipe();
    let cli = Cli::parse();
    if let Some(threads) = cli.threads {
        mica_array::set_threads(threads.into());
    }
    if let Some(bytes) = cli.memory_limit {
        // Arrays heed it once a model is loaded.
        mica_array::memory::set_process_limit(bytes);
    }
    let code = exit::guarded(|| match cli.command {
        Command::Quickstart(args) => commands::quickstart::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Train(args) => commands::train::run(args),
        Command::Lora(args) => commands::lora::run(args),
        Command::Fuse(args) => commands::fuse::run(args),
        Command::Convert(args) => commands::convert::run(args),
        Command::Perplexity(args) => commands::perplexity::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mica", &mut script);
            output::bytes(&script)
        }
    });
    if let Some(table) = mica_array::profile::report() {
        eprint!("{table}");
    }
    code
}
