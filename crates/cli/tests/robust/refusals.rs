//! Flags, variables and files that ask for what has no meaning: refused with the right code, instead of being taken
//! for a default.

use crate::program::{Ran, Room, edit};

fn room() -> Room {
    let room = Room::new();
    room.model("llama", "llama");
    room.data("d.jsonl", 8);
    std::fs::create_dir(room.path("data")).unwrap();
    for name in ["train", "valid", "test"] {
        room.data(&format!("data/{name}.jsonl"), 6);
    }
    room
}

const TRAIN: &str =
    "train --model @llama --data @d.jsonl --max-seq-length 32 --steps 1 --batch-size 2 --output @o";
const LORA: &str =
    "lora --model @llama --data @data --max-seq-length 32 --iters 1 --batch-size 2 --adapter-path @o";

#[test]
fn numbers_that_are_none_are_no_defaults() {
    let room = room();
    let generate = "generate --model @llama --prompt-tokens 1 -n 1";
    let bench = "bench --train --model @llama --seq 8 --steps 1";
    for (command, flag) in [
        (TRAIN, "--learning-rate"),
        (TRAIN, "--lora-alpha"),
        (TRAIN, "--lora-dropout"),
        (TRAIN, "--max-grad-norm"),
        (TRAIN, "--weight-decay"),
        (TRAIN, "--warmup-ratio"),
        (LORA, "--learning-rate"),
        (LORA, "--lora-scale"),
        (bench, "--learning-rate"),
        (generate, "--temp"),
        (generate, "--repetition-penalty"),
    ] {
        for value in ["nan", "inf", "1e400"] {
            let name = format!("{command} {flag} {value}");
            room.run(&name).failed(&name, 2).says(&name, &["finite", flag]);
        }
    }
    std::fs::write(room.path("c.yaml"), "learning_rate: .inf\n").unwrap();
    room.run(&format!("{TRAIN} --config @c.yaml")).failed("a file", 7).says("a file", &["finite"]);
    assert!(!room.path("o").exists());
}

#[test]
fn what_has_no_meaning_is_refused() {
    let room = room();
    std::fs::write(room.path("empty.txt"), "").unwrap();
    std::fs::write(
        room.path("blank.jsonl"),
        "{\"prompt\": \"the number\", \"completion\": \"\"}\n"
            .replace("number", &"number ".repeat(99))
            .repeat(3),
    )
    .unwrap();
    let huge = usize::MAX;
    let before = room.names();
    let cases: [(&str, String, i32, &str); 24] = [
        ("overlap", format!("perplexity --model @llama --file @d.jsonl --overlap {huge}"), 2, "--overlap"),
        ("no text", "perplexity --model @llama --file @empty.txt".into(), 7, "empty.txt"),
        ("one token", "perplexity --model @llama --file @d.jsonl --max-tokens 1".into(), 2, "--max-tokens"),
        ("groups", "convert --model @llama -q --q-group-size 128 --output @o".into(), 2, "64, 96"),
        ("no test", format!("{LORA} --test --test-batches 0"), 2, "test_batches"),
        ("no validation", format!("{LORA} --train --val-batches 0"), 2, "val_batches"),
        ("less than all", format!("{LORA} --test --test-batches=-2"), 2, "test_batches"),
        ("no validation, train", format!("{TRAIN} --val-batches 0 --hold-out 1"), 2, "val_batches"),
        ("batches of no test", format!("{TRAIN} --test-batches 3"), 2, "--test"),
        (
            "rows without an answer",
            "train --model @llama --data @blank.jsonl --output @o --max-seq-length 32".into(),
            7,
            "blank.jsonl",
        ),
        ("a batch past all numbers", format!("bench --train --model @llama --batch {huge}"), 2, "--batch"),
        (
            "rows past all memory",
            "bench --train --model @llama --batch 65536 --seq 256".into(),
            2,
            "positions",
        ),
        ("a depth past all numbers", format!("bench --model @llama --depth {huge} -g 2"), 2, "256"),
        ("generation in training", "bench --train --model @llama -g 2".into(), 2, "--train"),
        ("a prompt in training", "bench --train --model @llama -p 4".into(), 2, "--train"),
        (
            "adapters of full training",
            "bench --train --model @llama --fine-tune-type full --lora-rank 16".into(),
            2,
            "--lora-rank",
        ),
        ("a long prompt", "bench --model @llama -p 300 --depth 4 -g 2".into(), 2, "300"),
        ("a deep cache", "bench --model @llama -p 4 --depth 250 -g 10".into(), 2, "250"),
        ("runs in training", "bench --train --model @llama -n 1".into(), 2, "--train"),
        ("raw tokens", "generate --model @llama --prompt-tokens 1 --raw".into(), 2, "--raw"),
        (
            "a system's tokens",
            "generate --model @llama --prompt-tokens 1 --system-prompt x".into(),
            2,
            "--system-prompt",
        ),
        ("a raw system", "generate --model @llama -p x --raw --system-prompt x".into(), 2, "--raw"),
        ("a cache of lots", format!("{LORA} --train --clear-cache-threshold lots"), 2, "8GB"),
        ("logits into a device", "logits --model @llama --tokens 1 -o /dev/full".into(), 2, "/dev/full"),
    ];
    for (name, arguments, code, words) in cases {
        room.run(&arguments).failed(name, code).says(name, &[words]);
        assert_eq!(room.names(), before, "{name}");
    }
    let note = room.run(&format!("{LORA} --test --num-layers 1 --rank 3"));
    note.succeeded("shape of no training").says("shape of no training", &["have no effect"]);
    room.run(&format!("{LORA} --train --clear-cache-threshold 1GB")).succeeded("a cache as in mlx-lm");
}

#[test]
fn texts_of_any_length_have_a_perplexity() {
    let room = room();
    std::fs::write(room.path("long.txt"), "the cat and the dog went home. ".repeat(60)).unwrap();
    let ran = room.run("perplexity --model @llama --file @long.txt --json");
    let document: serde_json::Value = serde_json::from_str(&ran.succeeded("long").out).unwrap();
    assert!(document["tokens"].as_u64().unwrap() > 256, "{document}");
}

#[test]
fn variables_are_heeded_or_refused() {
    let room = room();
    let with = |variable: &str, value: &str, arguments: &str| {
        Ran::of(&room.command(arguments).env(variable, value).output().unwrap())
    };
    let generate = "generate --model @llama --prompt-tokens 1 -n 1";
    for value in ["abc", "0", "99999999", "-1", "1.5"] {
        with("MICA_THREADS", value, generate).failed(value, 2).says(value, &["MICA_THREADS", "1024", value]);
    }
    with("MICA_THREADS", "", generate).succeeded("empty");
    with("MICA_THREADS", "1", generate).succeeded("one");
    with("MICA_THREADS", "abc", &format!("{generate} --threads 1")).succeeded("the flag wins");
    // The variable is a default: it stands back where lengths are given, and a run that goes on has its own.
    let variable = "MICA_BUCKET_SIZE";
    with(variable, "none", TRAIN).failed("no number", 2).says("no number", &[variable]);
    with(variable, "24", &format!("{TRAIN} --bucket-sizes 17,32")).succeeded("lengths given");
    let settings = || std::fs::read_to_string(room.path("o/config.yaml")).unwrap();
    assert!(settings().contains("17"), "{}", settings());
    with(variable, "24", "train --resume --output @o").succeeded("goes on");
    with(variable, "24", &format!("{TRAIN} --overwrite")).succeeded("the default");
    assert!(settings().contains("24"), "{}", settings());
}

#[cfg(target_os = "linux")]
#[test]
fn threads_that_do_not_start_are_refused_or_done_without() {
    let room = room();
    // Stacks of a thousand threads do not fit; a few do.
    let limited = |threads: Option<&str>, arguments: &str| {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "ulimit -v 1500000 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_mica")]);
        command.args(room.command(arguments).get_args()).env_remove("RUST_BACKTRACE");
        if let Some(threads) = threads {
            command.env("MICA_THREADS", threads);
        }
        Ran::of(&command.output().unwrap())
    };
    let generate = "generate --model @llama --prompt-tokens 1 -n 1";
    for (threads, arguments) in
        [(None, format!("{generate} --threads 1024")), (Some("1024"), generate.into())]
    {
        let ran = limited(threads, &arguments);
        ran.failed(&arguments, 1).says(&arguments, &["1024 threads", "--threads", "ulimit"]);
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    }
    limited(None, &format!("{generate} --threads 2")).succeeded("two");
}

#[test]
fn what_was_not_measured_is_null() {
    let room = room();
    let read = |ran: Ran| -> serde_json::Value { serde_json::from_str(&ran.succeeded("run").out).unwrap() };
    let first = read(room.run(&format!("{TRAIN} --json")));
    assert!(first["loss_first"].is_f64() && first["it_per_s"]["deviation"][0].is_null(), "{first}");
    let again = read(room.run("train --resume --output @o --json"));
    for key in ["loss_first", "loss_last", "peak_memory_gb"] {
        assert!(again[key].is_null(), "{key} in {again}");
    }
    assert!(!again.to_string().contains("-0.0"), "{again}");
}

#[test]
fn runs_keep_out_of_model_folders() {
    let room = room();
    room.model("qwen3", "other");
    let names = |folder: &str| {
        let mut names: Vec<_> =
            std::fs::read_dir(room.path(folder)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for folder in ["llama", "other"] {
        let before = names(folder);
        for command in [TRAIN, LORA] {
            let arguments = format!("{command} --train").replace("@o", &format!("@{folder}"));
            let arguments =
                if command == TRAIN { arguments.replace(" --train", " --overwrite") } else { arguments };
            room.run(&arguments).failed(&arguments, 2).says(&arguments, &["holds a model"]);
            assert_eq!(names(folder), before, "{arguments}");
        }
    }
}

#[test]
fn scaled_rope_reads_what_it_is_made_for() {
    let room = room();
    let model = room.model("llama", "yarn");
    edit(&model, "config.json", |config| {
        config["rope_scaling"] =
            serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
    });
    let tokens = vec!["1"; 300].join(",");
    room.run(&format!("generate --model @yarn --prompt-tokens {tokens} -n 1")).succeeded("300 tokens");
    let train =
        "train --model @yarn --data @d.jsonl --max-seq-length 300 --steps 1 --batch-size 1 --output @o";
    let ran = room.run(train);
    assert!(!ran.succeeded("train").err.contains("samples are cut"), "{}", ran.err);
}
