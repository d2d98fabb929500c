//! What must not depend on the number of threads, nor on what a sequence is computed together with.

use serde_json::Value;

use crate::program::Room;

/// The same command with one and with two threads; gives what `read` finds after each.
fn both<T: PartialEq + std::fmt::Debug>(room: &Room, name: &str, arguments: &str, read: impl Fn(&str) -> T) {
    let results = [1, 2].map(|threads| {
        let ran = room.run(&format!("{arguments} --threads {threads}"));
        ran.succeeded(name);
        read(&ran.out)
    });
    assert!(results[0] == results[1], "{name}: {results:?}");
}

#[test]
fn threads_change_nothing() {
    let room = Room::new();
    room.data("data.jsonl", 16);
    for model in ["llama", "llama-4bit", "llama-tied-bf16", "qwen3-8bit", "lfm2", "mistral"] {
        room.model(model, model);
        let tokens: Vec<String> = (0..90).map(|i| (i * 37 % 95 + 1).to_string()).collect();
        let tokens = tokens.join(",");
        for flags in ["", "--exact", "--no-cache"] {
            let name = format!("logits of {model} {flags}");
            let arguments = format!("logits --model @{model} --tokens {tokens} --output @l.npy {flags}");
            both(&room, &name, &arguments, |_| std::fs::read(room.path("l.npy")).unwrap());
        }
        for flags in ["", "--temp 0.9 --seed 7 --top-p 0.95", "--temp 1.5 --seed 8 --top-k 20 --min-p 0.01"] {
            let name = format!("{model} {flags}");
            let arguments =
                format!("generate --model @{model} --prompt-tokens {tokens} -n 24 --json {flags}");
            both(&room, &name, &arguments, |out| {
                let document: Value = serde_json::from_str(out).unwrap();
                (document["tokens"].clone(), document["logprobs"].clone())
            });
        }
    }
    for (name, more) in [
        ("LoRA", "--model @llama --lora-dropout 0.2"),
        ("LoRA on 4 bits", "--model @llama-4bit"),
        ("all weights", "--model @llama --fine-tune-type full"),
    ] {
        let arguments = format!(
            "train --data @data.jsonl --steps 6 --max-seq-length 64 --batch-size 4 --hold-out 4 --eval-every 3 \
             --output @run --overwrite {more}"
        );
        both(&room, name, &arguments, |_| {
            let text = std::fs::read_to_string(room.path("run/metrics.jsonl")).unwrap();
            let numbers = |line: &str| {
                let line: Value = serde_json::from_str(line).unwrap();
                ["step", "loss", "grad_norm", "val_loss"].map(|key| line[key].to_string())
            };
            text.lines().map(numbers).collect::<Vec<_>>()
        });
    }
}

#[test]
fn a_prompt_in_one_piece_or_token_by_token_has_the_same_logits() {
    let room = Room::new();
    let tokens: Vec<String> = (0..70).map(|i| (i * 29 % 95 + 1).to_string()).collect();
    let tokens = tokens.join(",");
    for model in ["llama", "qwen2", "qwen3", "mistral", "lfm2"] {
        room.model(model, model);
        let logits = |flags: &str| {
            let name = format!("{model} {flags}");
            room.run(&format!("logits --model @{model} --tokens {tokens} --output @l.npy --exact {flags}"))
                .succeeded(&name);
            std::fs::read(room.path("l.npy")).unwrap()
        };
        assert!(logits("") == logits("--no-cache"), "{model}");
    }
}
