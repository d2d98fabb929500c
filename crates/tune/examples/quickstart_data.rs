//! Writes the quickstart's data to a folder, to look at it or to train on it elsewhere:
//! `cargo run --release -p mica-tune --example quickstart_data -- FOLDER [DOCUMENTS]`.
//!
//! `corpus.jsonl` (`text`, or `messages` for small talk), `train.jsonl`, `valid.jsonl` (the held-out
//! questions), `tokenizer.json`, `tokenizer_config.json`.

use std::io::Write;
use std::path::Path;

use mica_tune::quickstart::corpus::{Document, document};
use mica_tune::quickstart::questions::{Part, Question};
use mica_tune::quickstart::tokenizer;
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: quickstart_data FOLDER [DOCUMENTS]")?;
    let documents: u64 = arguments.next().map_or(Ok(2000), |n| n.parse())?;
    let seed = 0;
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder)?;
    let lines = |name: &str, lines: &mut dyn Iterator<Item = Value>| -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join(name))?);
        for line in lines {
            writeln!(file, "{line}")?;
        }
        file.flush()
    };
    lines(
        "corpus.jsonl",
        &mut (0..documents).map(|number| match document(seed, number) {
            Document::Text(text) => json!({"text": text}),
            Document::Chat(turns) => {
                let roles = ["user", "assistant"].into_iter().cycle();
                let messages: Vec<Value> = turns
                    .iter()
                    .zip(roles)
                    .map(|(content, role)| json!({"role": role, "content": content}))
                    .collect();
                json!({"messages": messages})
            }
        }),
    )?;
    lines("train.jsonl", &mut Question::some(seed, Part::Train, 4000).iter().map(Question::line))?;
    lines("valid.jsonl", &mut Question::some(seed, Part::HeldOut, 200).iter().map(Question::line))?;
    std::fs::write(folder.join("tokenizer.json"), tokenizer::train(seed, 4000, 1536)?)?;
    std::fs::write(folder.join("tokenizer_config.json"), tokenizer::config(512))?;
    Ok(())
}
