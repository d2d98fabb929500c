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

/// Run, fine-tune and quantize language models on this machine.
#[derive(Parser)]
#[command(name = "mica", version, about, max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    /// How many threads compute [default: MICA_THREADS, or the physical (or performance) cores that this process may
    /// use]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Most memory that this process may take: 8GB, 500MB, or bytes [default: what the machine has]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    memory_limit: Option<u64>,

    #[command(subcommand)]
    command: Command,
}

/// A number that is neither NaN nor infinite.
fn parse_finite(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite())
        .ok_or_else(|| "expected a finite number".to_string())
}

/// [`parse_finite`] for numbers of single precision.
fn parse_finite_f32(text: &str) -> Result<f32, String> {
    let narrow = parse_finite(text)? as f32;
    if narrow.is_finite() {
        Ok(narrow)
    } else {
        Err("expected a finite number of single precision".to_string())
    }
}

/// A size of at least 1 MB: less is a number whose unit was forgotten.
fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = mica_lm::memory::parse_size(text)?;
    if bytes < 1_000_000 {
        return Err(format!("{text:?} is {bytes} bytes; give a unit, as in 8GB, and at least 1MB"));
    }
    Ok(bytes)
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
    let threads = match (cli.threads, mica_array::threads_of_environment()) {
        (Some(threads), _) => Some(threads.into()),
        (None, Ok(threads)) => threads,
        (None, Err(error)) => return exit::report(Err(exit::Usage(error).into())),
    };
    // A number that someone asked for is kept or refused; the default takes what there is.
    if let Some(Err(error)) = threads.map(mica_array::set_threads) {
        return exit::report(Err(error.into()));
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
