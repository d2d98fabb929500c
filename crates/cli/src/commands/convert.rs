//! `mica convert`: quantize, dequantize, or store a model in another dtype.

use std::path::PathBuf;

use clap::ValueEnum;
use mica_array::Dtype;
use mica_lm::config::{QuantMode, QuantSpec};
use mica_lm::convert::{Converted, Recipe, convert};

use crate::exit::Usage;
use crate::output::say;
use crate::signals::stop_flag;

/// Quantize a model, make a quantized one plain, or change its dtype
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or the name of one in the local Hugging Face cache
    #[arg(long, short, visible_alias = "hf-path", value_name = "MODEL")]
    model: String,
    /// The new folder
    #[arg(long, short, visible_alias = "mlx-path", value_name = "FOLDER", default_value = "mlx_model")]
    output: PathBuf,
    /// Quantize
    #[arg(long, short)]
    quantize: bool,
    /// Bits of a weight [default: 4]
    #[arg(long, value_name = "B", requires = "quantize")]
    q_bits: Option<usize>,
    /// Weights that share a scale [default: 64]
    #[arg(long, value_name = "G", requires = "quantize")]
    q_group_size: Option<usize>,
    /// How a group is coded
    #[arg(long, value_name = "MODE", requires = "quantize", default_value = "affine")]
    q_mode: Mode,
    /// Make quantized weights plain
    #[arg(long, short, conflicts_with = "quantize")]
    dequantize: bool,
    /// Store float tensors in this dtype
    #[arg(long)]
    dtype: Option<FloatType>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

/// What floats are stored in.
#[derive(Clone, Copy, ValueEnum)]
enum FloatType {
    Float32,
    Bfloat16,
    Float16,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    if !matches!(args.q_mode, Mode::Affine) {
        return Err(Usage("--q-mode: only affine can be written so far".to_string()).into());
    }
    let spec = QuantSpec {
        bits: args.q_bits.unwrap_or(4),
        group_size: args.q_group_size.unwrap_or(64),
        mode: QuantMode::Affine,
    };
    if !matches!(spec.bits, 2..=6 | 8) || !matches!(spec.group_size, 32 | 64 | 128) {
        let text = format!(
            "--q-bits must be 2 to 6 or 8 and --q-group-size 32, 64 or 128, got {} and {}",
            spec.bits, spec.group_size
        );
        return Err(Usage(text).into());
    }
    let stop = stop_flag()?;
    let recipe = Recipe {
        stop: Some(&*stop),
        quantize: args.quantize.then_some(spec),
        dequantize: args.dequantize,
        dtype: args.dtype.map(|dtype| match dtype {
            FloatType::Float32 => Dtype::F32,
            FloatType::Bfloat16 => Dtype::BF16,
            FloatType::Float16 => Dtype::F16,
        }),
        ..Recipe::default()
    };
    let source = mica_lm::locate::locate(&args.model)?;
    report(&convert(source, &args.output, &recipe)?, args.json)
}

/// Tells what was written.
pub fn report(done: &Converted, as_json: bool) -> anyhow::Result<()> {
    let bits = done.bits_per_weight();
    if as_json {
        let document = serde_json::json!({
            "output": done.folder,
            "quantized": done.quantized,
            "plain": done.plain,
            "parameters": done.parameters,
            "bytes": done.bytes,
            "bits_per_weight": bits,
        });
        say!("{document}");
    } else {
        say!(
            "{}: {:.2} GB, {bits:.3} bits a weight ({} weights quantized, {} plain)",
            done.folder.display(),
            done.bytes as f64 / 1e9,
            done.quantized,
            done.plain
        );
    }
    Ok(())
}
