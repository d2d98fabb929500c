//! Too little memory: said before anything is begun, and kept to.

use serde_json::Value;

use crate::program::{Ran, Room};

fn room() -> Room {
    let room = Room::new();
    let text = "the number comes before the other one and so on ".repeat(30);
    let line = serde_json::json!({"text": text}).to_string() + "\n";
    std::fs::write(room.path("data.jsonl"), line.repeat(32)).unwrap();
    room.model("llama", "llama");
    room
}

const TRAIN: &str =
    "train --model @llama --data @data.jsonl --steps 3 --max-seq-length 256 --batch-size 32 --json";

fn estimate(ran: &Ran) -> f64 {
    let line =
        ran.err.lines().find_map(|line| line.trim().strip_prefix("Estimated peak memory ")).expect("told");
    line.strip_suffix(" GB").unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let room = room();
    let before = room.names();
    for (name, arguments, words) in [
        (
            "training",
            format!("{TRAIN} --micro-batch-size 32 --output @out --memory-limit 60MB"),
            &[
                "--micro-batch-size 16",
                "with activations recomputed",
                "--max-seq-length",
                "quantized",
                "0.06 GB",
            ][..],
        ),
        (
            "mlx-lm's command",
            "lora --model @llama --train --data @data.jsonl --adapter-path @out --batch-size 32 --iters 2 \
             --max-seq-length 256 --memory-limit 60MB"
                .into(),
            &["--batch-size 16", "with activations recomputed"],
        ),
        (
            "measuring training",
            "bench --train --model @llama --seq 256 --batch 64 --steps 1 --memory-limit 60MB".into(),
            &["64 × 256", "more memory", "--batch 32", "--grad-checkpoint", "--seq 128", "0.06 GB"],
        ),
        (
            "measuring many sequences",
            "bench --model @llama -p 4 --depth 200 -g 4 -n 1 --batch 4096 --memory-limit 60MB".into(),
            &["4096 sequences", "--batch", "0.06 GB"],
        ),
        (
            "opening",
            "generate --model @llama --prompt-tokens 1 --memory-limit 1MB".into(),
            &["quantize", "0.00 GB"],
        ),
    ] {
        room.run(&arguments).failed(name, 5).says(name, words);
        assert_eq!(room.names(), before, "{name}");
    }
    for limit in ["0", "12", "lots", "-1GB", "5XB"] {
        let arguments = format!("generate --model @llama --prompt-tokens 1 --memory-limit={limit}");
        room.run(&arguments).failed(limit, 2);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_estimate_is_near_the_peak_and_limits_are_kept() {
    let room = room();
    let mut estimates = Vec::new();
    for (name, more) in [
        ("LoRA, 32 rows", "--micro-batch-size 32"),
        ("LoRA, 8 rows", "--micro-batch-size 8"),
        ("LoRA, 2 rows", "--micro-batch-size 2"),
        ("recomputing", "--micro-batch-size 32 --grad-checkpoint"),
        ("all weights", "--micro-batch-size 16 --fine-tune-type full"),
    ] {
        let ran = room.run(&format!("{TRAIN} --output @out --overwrite {more}"));
        let summary: Value = serde_json::from_str(&ran.succeeded(name).out).unwrap();
        let (estimate, peak) = (estimate(&ran), summary["peak_memory_gb"].as_f64().unwrap());
        println!("{name}: estimated {estimate:.4} GB, measured {peak:.4} GB");
        assert!((estimate / peak - 1.0).abs() < 0.15, "{name}: estimated {estimate} GB, measured {peak} GB");
        estimates.push(estimate);
    }
    // 8 rows of 256 are what is taken where there is room. With less, fewer are, and the limit is kept.
    let limit = ((estimates[1] + estimates[2]) / 2.0 * 1e9) as u64;
    let ran = room.run(&format!("{TRAIN} --output @out --overwrite --memory-limit {limit}"));
    ran.succeeded("a limit").says("a limit", &["8 would not fit"]);
    let summary: Value = serde_json::from_str(&ran.out).unwrap();
    let peak = summary["peak_memory_gb"].as_f64().unwrap();
    assert!(peak * 1e9 <= limit as f64 * 1.05, "{peak} GB under a limit of {limit} bytes");
    // A run that goes on keeps what was found to fit.
    room.run("train --output @out --resume --json").succeeded("resumed");
    // The rows that were asked for stay, and blocks are recomputed for them.
    let limit = ((estimates[0] + estimates[3]) / 2.0 * 1e9) as u64;
    let ran =
        room.run(&format!("{TRAIN} --output @out --overwrite --micro-batch-size 32 --memory-limit {limit}"));
    ran.succeeded("recomputing")
        .says("recomputing", &["Recomputing the activations of ", "of 2 blocks: otherwise"]);
    let summary: Value = serde_json::from_str(&ran.out).unwrap();
    let peak = summary["peak_memory_gb"].as_f64().unwrap();
    assert!(peak * 1e9 <= limit as f64 * 1.05, "{peak} GB under a limit of {limit} bytes");
}
