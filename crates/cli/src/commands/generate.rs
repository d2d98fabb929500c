//! `mica generate`: one answer, streamed.

use std::io::{IsTerminal, Read, Write};

use anyhow::Context;
use mica_lm::ErrorKind;
use mica_lm::chat::ChatTemplate;
use mica_lm::generate::{FinishReason, Generator};
use mica_lm::tokenizer::Tokenizer;

use super::{ModelArgs, SamplingArgs, Tokens, parse_tokens, prompt_tokens};
use crate::exit::Usage;
use crate::machine::peak_memory_gb;

/// Generate one answer to a prompt
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt; `-` reads it from stdin
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// The prompt as token ids, instead of text
    #[arg(long, value_name = "1,2,3", conflicts_with_all = ["prompt", "system_prompt", "raw"], value_parser = parse_tokens)]
    prompt_tokens: Option<Tokens>,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system_prompt: Option<String>,
    /// Give the prompt to the model as it is, also where there is a chat template
    #[arg(long, visible_alias = "ignore-chat-template")]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print one JSON document instead of the text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let prompt = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("reading the prompt from stdin")?;
            Some(text)
        }
        other => other.map(str::to_string),
    };
    if prompt.is_none() && args.prompt_tokens.is_none() {
        return Err(
            Usage("give a prompt: --prompt TEXT, --prompt - or --prompt-tokens 1,2,3".to_string()).into()
        );
    }
    let loaded = args.model.open()?;
    let tokenizer = match Tokenizer::load(&loaded.folder) {
        Ok(tokenizer) => Some(tokenizer),
        Err(error) if args.prompt_tokens.is_some() && error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let tokens = match (&tokenizer, prompt, args.prompt_tokens) {
        (_, _, Some(tokens)) => tokens,
        (Some(tokenizer), Some(text), None) => {
            let template = if args.raw { None } else { ChatTemplate::load(&loaded.folder)? };
            prompt_tokens(tokenizer, template.as_ref(), args.system_prompt.as_deref(), &text)?
        }
        _ => unreachable!("a prompt was given, and text has a tokenizer"),
    };
    let mut options = args.sampling.options(&loaded)?;
    options.sampling.logprobs = args.json;
    let eos =
        tokenizer.as_ref().map_or(loaded.config.eos_ids.clone(), |tokenizer| tokenizer.eos_ids().to_vec());
    let mut generator = Generator::new(loaded.model.as_ref(), tokenizer.as_ref(), &eos, &tokens, options)?;
    let (mut text, mut generated, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    let mut finish = FinishReason::Length;
    let mut out = std::io::stdout().lock();
    for piece in generator.by_ref() {
        let piece = piece?;
        generated.push(piece.token);
        logprobs.push(piece.logprob);
        finish = piece.finish.unwrap_or(finish);
        if args.json {
            text.push_str(&piece.text);
        } else if !piece.text.is_empty() {
            write!(out, "{}", piece.text)?;
            out.flush()?;
        }
    }
    let statistics = generator.statistics();
    if args.json {
        let document = serde_json::json!({
            "text": text,
            "tokens": generated,
            "logprobs": logprobs,
            "finish_reason": finish.name(),
            "prompt_tokens": statistics.prompt_tokens,
            "prompt_tps": statistics.prompt_tps(),
            "generation_tps": statistics.generation_tps(),
            "peak_memory_gb": peak_memory_gb(),
        });
        writeln!(out, "{document}")?;
        return Ok(());
    }
    if tokenizer.is_none() {
        let ids: Vec<String> = generated.iter().map(u32::to_string).collect();
        write!(out, "{}", ids.join(","))?;
    }
    writeln!(out)?;
    if std::io::stderr().is_terminal() {
        let peak = peak_memory_gb().map_or_else(String::new, |gb| format!("; peak memory {gb:.2} GB"));
        let rate = statistics.generation_tps().map_or_else(String::new, |tps| format!(", {tps:.1} tokens/s"));
        eprintln!(
            "prompt: {} tokens, {:.1} tokens/s; generation: {} tokens{rate}{peak}",
            statistics.prompt_tokens,
            statistics.prompt_tps(),
            statistics.generated_tokens,
        );
    }
    Ok(())
}
