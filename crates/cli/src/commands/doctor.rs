//! `mica doctor`: what this machine is and what it should reach.

use mica_simd::Isa;

use crate::machine;
use crate::output::say;

/// Show this machine, its instruction sets and its memory bandwidth
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let threads = mica_array::threads();
    let tiers: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    let bandwidth = machine::read_bandwidth(threads, 1 << 30);
    if args.json {
        let document = serde_json::json!({
            "processor": machine::processor(),
            "threads": threads,
            "isa": Isa::get().name(),
            "isa_available": tiers,
            "memory_gb": machine::total_memory_gb(),
            "read_bandwidth_gbs": bandwidth,
        });
        say!("{document}");
        return Ok(());
    }
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_string());
    say!("processor          {}", or_unknown(machine::processor()));
    say!("threads            {threads}");
    say!("instruction sets   {} (using {})", tiers.join(", "), Isa::get());
    say!("memory             {}", or_unknown(machine::total_memory_gb().map(|gb| format!("{gb:.1} GB"))));
    say!("read bandwidth     {}", or_unknown(bandwidth.map(|rate| format!("{rate:.1} GB/s"))));
    match Isa::get() {
        Isa::Amx => say!("bf16 and int8 products run on AMX tiles: prompts and training are fast"),
        Isa::Avx512 => say!("bf16 and int8 products run on AVX-512: prompts and training are fast"),
        Isa::Avx2 => say!("no AVX-512 with VNNI and BF16: prompts and training run at AVX2 speed"),
        Isa::Neon => say!("NEON kernels are used where they exist; others run as portable code"),
        Isa::Scalar => say!("no vector instructions are used: everything is slow"),
    }
    Ok(())
}
