//! `mica fuse`: a model folder with an adapter merged into it.

use std::path::PathBuf;

use crate::signals::stop_flag;

/// Merge an adapter into its model
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or the name of one in the local Hugging Face cache
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// Folder of the adapter: mica's, mlx-lm's or PEFT's
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    adapter_path: PathBuf,
    /// The new folder
    #[arg(long, visible_alias = "output", value_name = "FOLDER", default_value = "fused_model")]
    save_path: PathBuf,
    /// Make quantized weights plain, which keeps the merge exact
    #[arg(long, visible_alias = "de-quantize")]
    dequantize: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let model = mica_lm::locate::locate(&args.model)?;
    let stop = stop_flag()?;
    let done =
        mica_tune::fuse::fuse(model, &args.adapter_path, &args.save_path, args.dequantize, Some(&*stop))?;
    super::convert::report(&done, args.json)
}
