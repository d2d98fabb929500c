//! `mica doctor`: what this machine is and what it should reach.

use mica_simd::Isa;
use serde_json::{Value, json};

use crate::machine::{self, Ceilings, Measured};
use crate::output::say;

/// Show this machine: its instruction sets, its ceilings, and what models can reach under them
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A model's sizes, as far as its cost depends on them.
struct Shape {
    name: &'static str,
    layers: u64,
    hidden: u64,
    /// Width of all query heads, and of all key heads.
    heads: (u64, u64),
    intermediate: u64,
    vocabulary: u64,
    tied: bool,
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "Qwen3-0.6B",
        layers: 28,
        hidden: 1024,
        heads: (2048, 1024),
        intermediate: 3072,
        vocabulary: 151_936,
        tied: true,
    },
    Shape {
        name: "Llama-3.2-1B",
        layers: 16,
        hidden: 2048,
        heads: (2048, 512),
        intermediate: 8192,
        vocabulary: 128_256,
        tied: true,
    },
    Shape {
        name: "Qwen3-4B",
        layers: 36,
        hidden: 2560,
        heads: (4096, 1024),
        intermediate: 9728,
        vocabulary: 151_936,
        tied: true,
    },
    Shape {
        name: "Llama-3.1-8B",
        layers: 32,
        hidden: 4096,
        heads: (4096, 1024),
        intermediate: 14_336,
        vocabulary: 128_256,
        tied: false,
    },
];

/// 4 bits and, for every 64 weights, a scale and a bias of 16.
const BYTES_PER_WEIGHT: f64 = 4.5 / 8.0;
/// The part of the read bandwidth that decoding should use: what is left goes to norms, attention and barriers.
const DECODING: f64 = 0.8;

/// What a model can reach under the ceilings, in 4 bits.
struct Reach {
    name: &'static str,
    weights_gb: f64,
    /// Tokens/s of decoding behind few tokens: every weight is read once a token.
    decoding: Option<f64>,
    /// Tokens/s of a prompt, all arithmetic on int8; its last token alone goes through the output head.
    prompt: Option<f64>,
    /// Tokens/s of LoRA training on bf16 products: forward, and back to the inputs.
    training: Option<f64>,
}

impl Reach {
    fn of(shape: &Shape, measured: &Measured) -> Reach {
        let (queries, keys) = shape.heads;
        let attention = 2 * shape.hidden * (queries + keys);
        let blocks = (shape.layers * (attention + 3 * shape.hidden * shape.intermediate)) as f64;
        let head = (shape.vocabulary * shape.hidden) as f64;
        Reach {
            name: shape.name,
            weights_gb: (blocks + if shape.tied { head } else { 2.0 * head }) * BYTES_PER_WEIGHT / 1e9,
            decoding: measured.read.map(|rate| rate * 1e9 / ((blocks + head) * BYTES_PER_WEIGHT)),
            prompt: measured.int8.map(|rate| rate * 1e9 / (2.0 * blocks)),
            training: measured.bf16.map(|rate| rate * 1e9 / (4.0 * (blocks + head))),
        }
    }

    /// Whether weights, cache and activations have room; `None` where the system does not say.
    fn fits(&self) -> Option<bool> {
        Some(1.25 * self.weights_gb < machine::total_memory_gb()?)
    }

    fn json(&self) -> Value {
        json!({
            "shape": self.name,
            "weights_gb": self.weights_gb,
            "fits": self.fits(),
            "decoding_tps_at_most": self.decoding,
            "decoding_tps_expected": self.decoding.map(|rate| DECODING * rate),
            "prompt_tps_at_most": self.prompt,
            "lora_tps_at_most": self.training,
        })
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let threads = mica_array::threads();
    let tiers: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    let measured = machine::measure(&Ceilings::new(1 << 30));
    let reach = SHAPES.map(|shape| Reach::of(&shape, &measured));
    if args.json {
        let document = json!({
            "processor": machine::processor(),
            "threads": threads,
            "isa": Isa::get().name(),
            "isa_available": tiers,
            "memory_gb": machine::total_memory_gb(),
            "read_bandwidth_gbs": measured.read,
            "ceilings": machine::json(&measured),
            "models": reach.iter().map(Reach::json).collect::<Vec<_>>(),
        });
        say!("{document}");
        return Ok(());
    }
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_string());
    say!("processor          {}", or_unknown(machine::processor()));
    say!("threads            {threads}");
    say!("instruction sets   {} (using {})", tiers.join(", "), Isa::get());
    say!("memory             {}", or_unknown(machine::total_memory_gb().map(|gb| format!("{gb:.1} GB"))));
    say!("ceilings           {}", machine::line(&measured));
    match Isa::get() {
        Isa::Amx => say!("bf16 and int8 products run on AMX tiles: prompts and training are fast"),
        Isa::Avx512 | Isa::Avx512Bf16 => {
            say!("bf16 and int8 products run on AVX-512: prompts and training are fast")
        }
        Isa::Avx2 => say!("no AVX-512 with VNNI and BF16: prompts and training run at AVX2 speed"),
        Isa::Neon => say!("NEON kernels are used where they exist; others run as portable code"),
        Isa::Scalar => say!("no vector instructions are used: everything is slow"),
    }
    say!(
        "\nModels in 4 bits under these ceilings, tokens/s (what a model does reach: mica bench --model MODEL)"
    );
    say!(
        "{:<14} {:>8} {:>5} {:>9} {:>9} {:>12} {:>12}",
        "",
        "weights",
        "fits",
        "decoding",
        "at most",
        "prompt, most",
        "LoRA, most"
    );
    for reach in &reach {
        let rate = |value: Option<f64>| value.map_or("-".to_string(), |rate| format!("{rate:.1}"));
        say!(
            "{:<14} {:>5.2} GB {:>5} {:>9} {:>9} {:>12} {:>12}",
            reach.name,
            reach.weights_gb,
            reach.fits().map_or("-", |fits| if fits { "yes" } else { "no" }),
            rate(reach.decoding.map(|rate| DECODING * rate)),
            rate(reach.decoding),
            rate(reach.prompt),
            rate(reach.training),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_models() {
        let measured = Measured { read: Some(10.0), f32: None, bf16: Some(100.0), int8: None };
        // Files of mlx-community's 4-bit conversions, without their metadata.
        for (shape, weights_gb) in SHAPES.iter().zip([0.335, 0.695, 2.263, 4.517]) {
            let reach = Reach::of(shape, &measured);
            assert!(
                (reach.weights_gb / weights_gb - 1.0).abs() < 2e-3,
                "{}: {}",
                shape.name,
                reach.weights_gb
            );
            // Of a table of embeddings that is not the output head, a step reads one row.
            let table = if shape.tied { 0.0 } else { 0.2955 };
            let decoding = reach.decoding.expect("the bandwidth is known");
            assert!(
                (decoding * (weights_gb - table) / 10.0 - 1.0).abs() < 2e-3,
                "{}: {decoding}",
                shape.name
            );
            assert_eq!((reach.prompt, reach.training.is_some()), (None, true), "{}", shape.name);
        }
    }
}
