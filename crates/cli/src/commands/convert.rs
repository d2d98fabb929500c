//! `mica convert`: quantize, dequantize, or store a model in another dtype.

use std::path::PathBuf;

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use mica_array::Dtype;
use mica_codec::CodecError;
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
    /// Bits of a weight [default: 4, mxfp8: 8]
    #[arg(long, value_name = "B", requires = "quantize")]
    q_bits: Option<usize>,
    /// Weights that share a scale [default: 64, mxfp4 and mxfp8: 32, nvfp4: 16]
    #[arg(long, value_name = "G", requires = "quantize")]
    q_group_size: Option<usize>,
    /// How a group is coded: affine, mxfp4, mxfp8 or nvfp4
    #[arg(long, value_name = "MODE", requires = "quantize", default_value = "affine", value_parser = mode())]
    q_mode: QuantMode,
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

/// What floats are stored in.
#[derive(Clone, Copy, ValueEnum)]
enum FloatType {
    Float32,
    Bfloat16,
    Float16,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let spec = quantization(&args)?;
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

/// The names of modes.
fn mode() -> impl TypedValueParser<Value = QuantMode> {
    PossibleValuesParser::new(QuantMode::ALL.map(QuantMode::name)).try_map(|name| name.parse())
}

/// How to quantize.
fn quantization(args: &Args) -> anyhow::Result<QuantSpec> {
    let (bits, group_size) = args.q_mode.defaults();
    let spec =
        QuantSpec::new(args.q_bits.unwrap_or(bits), args.q_group_size.unwrap_or(group_size), args.q_mode);
    let usage = |text: String| Err(Usage(text).into());
    match spec {
        // A bit is for arrays: no model says anything with it.
        Ok(spec) if spec.bits() > 1 => Ok(spec),
        Ok(_) => usage("--q-bits: expected 2 to 6 or 8, got 1".to_string()),
        Err(CodecError::Bits { bits, mode, expected }) => {
            usage(format!("--q-bits: expected {expected} in mode {mode}, got {bits}"))
        }
        Err(CodecError::GroupSize { group_size, mode, expected }) => {
            usage(format!("--q-group-size: expected {expected} in mode {mode}, got {group_size}"))
        }
        Err(other) => usage(other.to_string()),
    }
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
