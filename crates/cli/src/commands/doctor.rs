//! `mica doctor`: what this machine is and what it should reach.

use mica_array::memory::{self, Bound, Room};
use mica_lm::memory::read_a_step;
use mica_simd::Isa;
use serde_json::{Value, json};

use crate::machine::{self, Measured};
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
        let blocks = shape.layers * (attention + 3 * shape.hidden * shape.intermediate);
        let head = shape.vocabulary * shape.hidden;
        let weights = blocks + if shape.tied { head } else { 2 * head };
        let read = read_a_step(weights, head, shape.tied) as f64 * BYTES_PER_WEIGHT;
        let (blocks, head) = (blocks as f64, head as f64);
        Reach {
            name: shape.name,
            weights_gb: weights as f64 * BYTES_PER_WEIGHT / 1e9,
            decoding: measured.read.map(|rate| rate * 1e9 / read),
            prompt: measured.int8.map(|rate| rate * 1e9 / (2.0 * blocks)),
            training: measured.bf16.map(|rate| rate * 1e9 / (4.0 * (blocks + head))),
        }
    }

    /// Whether weights, cache and activations have room in what a process may have; `None` where nobody says.
    fn fits(&self, most: Option<Room>) -> Option<bool> {
        Some(1.25 * self.weights_gb < most?.bytes as f64 / 1e9)
    }

    fn json(&self, most: Option<Room>) -> Value {
        json!({
            "shape": self.name,
            "weights_gb": self.weights_gb,
            "fits": self.fits(most),
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
    let measured = machine::measure(&machine::ceilings(0));
    let most = memory::most();
    let reach = SHAPES.map(|shape| Reach::of(&shape, &measured));
    if args.json {
        let document = json!({
            "processor": machine::processor(),
            "threads": threads,
            "isa": Isa::get().name(),
            "isa_available": tiers,
            "memory_gb": machine::total_memory_gb(),
            "memory_at_most_gb": most.map(|room| room.bytes as f64 / 1e9),
            "read_bandwidth_gbs": measured.read,
            "ceilings": machine::json(&measured),
            "models": reach.iter().map(|reach| reach.json(most)).collect::<Vec<_>>(),
        });
        say!("{document}");
        return Ok(());
    }
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_string());
    say!("processor          {}", or_unknown(machine::processor()));
    say!("threads            {threads}");
    say!("instruction sets   {} (using {})", tiers.join(", "), Isa::get());
    let total = or_unknown(machine::total_memory_gb().map(|gb| format!("{gb:.1} GB")));
    say!("memory             {total}{}", bounded(most));
    say!("ceilings           {}", machine::line(&measured));
    say!("{}", products(Isa::get(), Isa::available()));
    say!(
        "\nModels in 4 bits under these ceilings, tokens/s. None of them was run: what a model does reach says"
    );
    say!("mica bench --model MODEL. Decoding as expected assumes {:.0} % of the most.", 100.0 * DECODING);
    say!(
        "{:<14} {:>8} {:>5} {:>9} {:>9} {:>12} {:>12}",
        "",
        "weights",
        "fits",
        "expected",
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
            reach.fits(most).map_or("-", |fits| if fits { "yes" } else { "no" }),
            rate(reach.decoding.map(|rate| DECODING * rate)),
            rate(reach.decoding),
            rate(reach.prompt),
            rate(reach.training),
        );
    }
    Ok(())
}

/// What bounds a process, where that is less than the machine.
fn bounded(most: Option<Room>) -> String {
    match most {
        Some(Room { bytes, bound }) if bound != Bound::Machine => {
            format!(", of which this process may have {:.1} GB {bound}", bytes as f64 / 1e9)
        }
        _ => String::new(),
    }
}

/// What products run on.
fn products(isa: Isa, available: &[Isa]) -> &'static str {
    match isa {
        Isa::Amx => "bf16 and int8 products run on AMX tiles: prompts and training are fast",
        Isa::Avx512Bf16 => "bf16 and int8 products run on AVX-512: prompts and training are fast",
        Isa::Avx512 => {
            "int8 products run on AVX-512: prompts are fast; bf16 products, those of training, run as f32 \
             multiply-adds, at their rate"
        }
        Isa::Avx2 | Isa::Avx2Vnni if available.contains(&Isa::Avx512) => {
            "AVX2 was chosen (MICA_ISA) over AVX-512: prompts and training run at AVX2 speed"
        }
        Isa::Avx2Vnni => {
            "int8 products run on AVX-VNNI: prompts are faster than with AVX2 alone; training runs at AVX2 speed"
        }
        Isa::Avx2 => "no AVX-512 with VNNI and BF16: prompts and training run at AVX2 speed",
        Isa::NeonI8mm | Isa::NeonDot => {
            "int8 products run on dot products of NEON; bf16 products, those of training, run as f32 multiply-adds, at \
             their rate"
        }
        Isa::Neon if available.contains(&Isa::NeonDot) => {
            "NEON without its dot products was chosen (MICA_ISA): prompts run slower than they could"
        }
        Isa::Neon => "no dot products of bytes: int8 products run as 16-bit ones, bf16 products as f32",
        Isa::Scalar => "no vector instructions are used: everything is slow",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_products_is_so_on_this_tier() {
        let all = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];
        for (isa, available, words, not) in [
            (Isa::Amx, &all[..], "AMX tiles", "f32"),
            (Isa::Avx512Bf16, &all[..4], "bf16 and int8 products run on AVX-512", "f32"),
            (Isa::Avx512, &all[..4], "bf16 products, those of training, run as f32", "bf16 and int8"),
            (Isa::Avx2, &all[..4], "was chosen", "no AVX-512"),
            (Isa::Avx2, &all[..2], "no AVX-512", "chosen"),
            (Isa::Avx2Vnni, &[Isa::Scalar, Isa::Avx2, Isa::Avx2Vnni], "AVX-VNNI", "chosen"),
            (Isa::NeonDot, &[Isa::Scalar, Isa::Neon, Isa::NeonDot], "dot products of NEON", "no dot"),
            (Isa::Neon, &[Isa::Scalar, Isa::Neon, Isa::NeonDot], "was chosen", "no dot"),
            (Isa::Neon, &[Isa::Scalar, Isa::Neon], "no dot products", "chosen"),
        ] {
            let text = products(isa, available);
            assert!(text.contains(words) && !text.contains(not), "{isa} of {available:?}: {text}");
        }
    }

    #[test]
    fn what_a_process_may_have_decides_what_fits() {
        let measured = Measured { read: None, f32: None, bf16: None, int8: None };
        let large = Reach::of(&SHAPES[3], &measured);
        let room = |bytes, bound| Some(Room { bytes, bound });
        for (name, most, fits, words) in [
            ("a large machine", room(64_000_000_000, Bound::Machine), Some(true), ""),
            ("a container", room(4_000_000_000, Bound::Group), Some(false), "4.0 GB in this container"),
            ("a limit", room(2_000_000_000, Bound::Limit(2_000_000_000)), Some(false), "under the limit"),
            ("nobody says", None, None, ""),
        ] {
            assert_eq!(large.fits(most), fits, "{name}");
            let said = bounded(most);
            assert!(said.contains(words) && said.is_empty() == words.is_empty(), "{name}: {said}");
        }
    }

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
