//! The commands, one file each.

pub mod bench;
pub mod bench_train;
pub mod chat;
pub mod convert;
pub mod doctor;
pub mod fuse;
pub mod generate;
pub mod logits;
pub mod lora;
pub mod perplexity;
pub mod quickstart;
pub mod train;

use std::path::PathBuf;

use mica_array::kv::{KvCodes, KvFormat};
use mica_lm::chat::{ChatRequest, ChatTemplate, Message};
use mica_lm::generate::Options;
use mica_lm::load::{Loaded, load};
use mica_lm::tokenizer::{Specials, Tokenizer};
use mica_lm::weights::Packing;

use crate::exit::Usage;

/// A model folder or a name in the local cache.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model folder, or the name of one in the local Hugging Face cache
    #[arg(long, short, value_name = "MODEL")]
    pub model: String,
    /// Folder of an adapter to put on the model: mica's, mlx-lm's or PEFT's
    #[arg(long, value_name = "FOLDER")]
    pub adapter_path: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the model.
    pub fn open(&self) -> anyhow::Result<Loaded> {
        let folder = mica_lm::locate::locate(&self.model)?;
        let mut loaded = load(&folder, Packing::Frozen)?;
        if let Some(adapter) = &self.adapter_path {
            mica_tune::adapters::files::load(&mut *loaded.model, adapter)?;
        }
        Ok(loaded)
    }
}

/// How to choose tokens.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Most tokens to generate (in mlx_lm.generate this is -m, which names the model here)
    #[arg(long, short = 'n', default_value_t = 256, value_name = "N")]
    pub max_tokens: usize,
    /// Temperature; 0 takes the likeliest token
    #[arg(long, visible_alias = "temperature", default_value_t = 0.0, value_name = "T", value_parser = crate::parse_finite_f32)]
    pub temp: f32,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = crate::parse_finite_f32)]
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the likeliest
    #[arg(long, default_value_t = 0.0, value_name = "P", value_parser = crate::parse_finite_f32)]
    pub min_p: f32,
    /// Draw from the N likeliest tokens; 0 from all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub top_k: usize,
    /// Make tokens that are among the last 20 less likely: their logits are divided by this if they are above 0, else
    /// multiplied
    #[arg(long, default_value_t = 1.0, value_name = "R", value_parser = crate::parse_finite_f32)]
    pub repetition_penalty: f32,
    /// Seed of the random choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Form products exactly in f32, instead of with int8 or bf16 activations
    #[arg(long)]
    pub exact: bool,
    #[command(flatten)]
    pub kv: KvArgs,
}

/// How keys and values are kept.
#[derive(clap::Args, Clone, Copy)]
pub struct KvArgs {
    /// Keep keys and values in 8 or 4 bits: about half or a quarter of the memory, and of what long contexts read
    #[arg(long, value_name = "BITS")]
    pub kv_bits: Option<usize>,
    /// So many of them share a scale: 32, 64 (the default) or 128
    #[arg(long, value_name = "N", requires = "kv_bits")]
    pub kv_group_size: Option<usize>,
}

impl KvArgs {
    /// What was asked for, else `otherwise`.
    pub fn format(&self, otherwise: KvFormat) -> Result<KvFormat, Usage> {
        let Some(bits) = self.kv_bits else { return Ok(otherwise) };
        let group = self.kv_group_size.unwrap_or(64);
        let codes =
            KvCodes::new(bits, group).map_err(|error| Usage(format!("--kv-bits: {}", error.message)))?;
        Ok(KvFormat::Codes(codes))
    }
}

impl SamplingArgs {
    /// As options for this model.
    pub fn options(&self, loaded: &Loaded) -> Result<Options, Usage> {
        let mut options = Options::for_model(loaded);
        options.max_tokens = self.max_tokens;
        options.stop = self.stop.clone();
        let sampling = &mut options.sampling;
        sampling.temperature = self.temp;
        sampling.top_p = self.top_p;
        sampling.min_p = self.min_p;
        sampling.top_k = self.top_k;
        sampling.repetition_penalty = self.repetition_penalty;
        sampling.seed = self.seed;
        if self.exact {
            options.precision = mica_array::Precision::Exact;
            options.kv_format = KvFormat::F32;
        }
        options.kv_format = self.kv.format(options.kv_format)?;
        Ok(options)
    }
}

/// The tokens of a prompt: through the chat template if the model has one, else as text.
pub fn prompt_tokens(
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    system: Option<&str>,
    prompt: &str,
) -> anyhow::Result<Vec<u32>> {
    let Some(template) = template else {
        if system.is_some() {
            return Err(Usage("--system-prompt needs a model with a chat template".to_string()).into());
        }
        return Ok(tokenizer.encode(prompt, Specials::ParseAndAdd)?);
    };
    let mut messages = Vec::new();
    messages.extend(system.map(|text| Message::new("system", text)));
    messages.push(Message::new("user", prompt));
    let request = ChatRequest { add_generation_prompt: true, ..ChatRequest::new(&messages) };
    Ok(template.encode(&request, tokenizer)?.ids)
}

/// Tokens given on the command line. (Under its own name, because clap takes a `Vec` for a flag that is repeated.)
pub type Tokens = Vec<u32>;

/// `1,2,3` as tokens.
pub fn parse_tokens(text: &str) -> Result<Vec<u32>, String> {
    text.split([',', ' '])
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| format!("{part:?} is not a token id")))
        .collect()
}
