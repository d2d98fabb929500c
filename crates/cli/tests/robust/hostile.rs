//! Model folders, adapters and data that are broken or do not belong together.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::program::{Room, edit, edit_weights};

const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

/// Every command that opens a model. They write to `@out`.
const COMMANDS: [(&str, &str); 12] = [
    ("generate", "generate --model @model --prompt cat -n 2"),
    ("generate tokens", "generate --model @model --prompt-tokens 1,2,3 -n 2"),
    ("chat", "chat --model @model -n 2"),
    ("train", "train --model @model --data @data.jsonl --output @out --steps 1 --max-seq-length 32"),
    ("full", "train --model @model --data @data.jsonl --output @out --steps 1 --fine-tune-type full"),
    ("lora", "lora --model @model --train --data @data --adapter-path @out --iters 1 --max-seq-length 32"),
    ("convert", "convert --model @model --output @out -q --q-group-size 32"),
    ("fuse", "fuse --model @model --adapter-path @adapter --save-path @out"),
    ("perplexity", "perplexity --model @model --file @text.txt --length 32"),
    ("bench", "bench --model @model -p 4 -g 1 -n 1"),
    ("bench --train", "bench --train --model @model --seq 8 --steps 1"),
    ("logits", "logits --model @model --tokens 1,2 --output @out.npy"),
];

type Damage = fn(&Path);

fn weights(model: &Path) -> std::path::PathBuf {
    model.join("model.safetensors")
}

fn cut(model: &Path, bytes: usize) {
    let all = std::fs::read(weights(model)).unwrap();
    std::fs::write(weights(model), &all[..bytes]).unwrap();
}

fn flip(model: &Path, byte: usize) {
    let mut all = std::fs::read(weights(model)).unwrap();
    all[byte] ^= 0x10;
    std::fs::write(weights(model), all).unwrap();
}

fn config(model: &Path, field: &str, value: Value) {
    edit(model, "config.json", |config| config[field] = value);
}

/// Moves the weights into a shard, and gives the index entry of one tensor this value.
fn shard(model: &Path, name: &str, file: &str) {
    let mut map = serde_json::Map::new();
    edit_weights(model, |header, _| {
        map = header.as_object().unwrap().clone();
        map.remove("__metadata__");
        map.values_mut().for_each(|entry| *entry = json!("model-00001-of-00002.safetensors"));
    });
    std::fs::rename(weights(model), model.join("model-00001-of-00002.safetensors")).unwrap();
    map.insert(name.to_string(), json!(file));
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(model.join("model.safetensors.index.json"), index).unwrap();
}

/// What is broken, the exit code, and words of the message. All commands must refuse.
fn damages() -> Vec<(&'static str, Damage, i32, &'static [&'static str])> {
    vec![
        ("weights cut in the header", |m| cut(m, 1000), 7, &["model.safetensors", "cut short"]),
        ("weights cut in the length", |m| cut(m, 5), 7, &["5 bytes"]),
        ("no bytes of weights", |m| cut(m, 0), 7, &["0 bytes"]),
        ("weights cut in the data", |m| cut(m, 300_000), 7, &["leaves the file", "cut short"]),
        ("a flipped bit in the header's length", |m| flip(m, 1), 7, &["model.safetensors"]),
        ("a flipped bit in the length's high byte", |m| flip(m, 6), 7, &["no safetensors file"]),
        ("a flipped bit in the header", |m| flip(m, 70), 7, &["header"]),
        (
            "a missing tensor and one too many",
            |m| {
                edit_weights(m, |header, _| {
                    let entry = header.as_object_mut().unwrap().remove(QUERY).unwrap();
                    header["model.foreign"] = entry;
                })
            },
            7,
            &[QUERY, "missing", "model.foreign", "no place"],
        ),
        (
            "another shape",
            |m| edit_weights(m, |header, _| header[QUERY]["shape"] = json!([48, 192])),
            7,
            &["[96, 96]", "[48, 192]"],
        ),
        (
            "another type of the same size",
            |m| edit_weights(m, |header, _| header[QUERY]["dtype"] = json!("I32")),
            7,
            &[QUERY, "I32"],
        ),
        (
            "an offset that overflows",
            |m| {
                edit_weights(m, |header, _| {
                    header[QUERY]["data_offsets"] = json!([1u64 << 63, (1u64 << 63) + 36864])
                })
            },
            7,
            &[QUERY],
        ),
        (
            "a shape that overflows",
            |m| edit_weights(m, |header, _| header[QUERY]["shape"] = json!([1u64 << 62, 4])),
            7,
            &[QUERY],
        ),
        (
            "overlapping tensors",
            |m| edit_weights(m, |header, _| header[QUERY]["data_offsets"] = json!([0, 36864])),
            7,
            &["overlap"],
        ),
        (
            "a flipped bit that makes an infinity",
            |m| {
                edit_weights(m, |header, data| {
                    let start = header[QUERY]["data_offsets"][0].as_u64().unwrap() as usize + 400;
                    data[start..start + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
                })
            },
            7,
            &[QUERY, "NaN or infinity", "element 100"],
        ),
        (
            "a missing shard",
            |m| shard(m, QUERY, "model-00002-of-00002.safetensors"),
            3,
            &["model-00002-of-00002.safetensors"],
        ),
        (
            "an index of another model",
            |m| shard(m, "foreign", "model-00001-of-00002.safetensors"),
            7,
            &["foreign"],
        ),
        (
            "a shard outside of the folder",
            |m| shard(m, QUERY, "../../passwd"),
            7,
            &["leads out of the folder"],
        ),
        ("no weights", |m| std::fs::remove_file(weights(m)).unwrap(), 3, &["has no model.safetensors"]),
        ("no configuration", |m| std::fs::remove_file(m.join("config.json")).unwrap(), 3, &["config.json"]),
        (
            "a cut configuration",
            |m| std::fs::write(m.join("config.json"), "{\"model").unwrap(),
            7,
            &["config.json"],
        ),
        (
            "a list as configuration",
            |m| std::fs::write(m.join("config.json"), "[1]").unwrap(),
            7,
            &["a list of 1"],
        ),
        (
            "bytes as configuration",
            |m| std::fs::write(m.join("config.json"), b"\xff\0").unwrap(),
            7,
            &["UTF-8"],
        ),
        (
            "a folder as configuration",
            |m| {
                std::fs::remove_file(m.join("config.json")).unwrap();
                std::fs::create_dir(m.join("config.json")).unwrap();
            },
            7,
            &["config.json"],
        ),
        (
            "an unknown architecture",
            |m| config(m, "model_type", json!("gpt_magic")),
            7,
            &["gpt_magic", "llama", "mistral", "qwen2", "qwen3", "lfm2"],
        ),
        ("no architecture", |m| config(m, "model_type", Value::Null), 7, &["model_type"]),
        ("no heads", |m| config(m, "num_attention_heads", json!(0)), 7, &["num_attention_heads"]),
        (
            "negative heads",
            |m| config(m, "num_attention_heads", json!(-4)),
            7,
            &["num_attention_heads", "-4"],
        ),
        ("too many key heads", |m| config(m, "num_key_value_heads", json!(4)), 7, &["num_key_value_heads"]),
        ("a huge width", |m| config(m, "hidden_size", json!(2147483647)), 7, &["2147483647"]),
        ("a width past all numbers", |m| config(m, "hidden_size", json!(1e300)), 7, &["hidden_size"]),
        ("a width in words", |m| config(m, "hidden_size", json!("96")), 7, &["hidden_size", "\"96\""]),
        ("more layers than there are", |m| config(m, "num_hidden_layers", json!(3)), 7, &["model.layers.2."]),
        ("fewer layers", |m| config(m, "num_hidden_layers", json!(1)), 7, &["no place"]),
        (
            "a hundred million layers",
            |m| config(m, "num_hidden_layers", json!(100000000)),
            7,
            &["num_hidden_layers"],
        ),
        ("a huge head", |m| config(m, "head_dim", json!(2147483646)), 7, &["head_dim"]),
        ("an odd head", |m| config(m, "head_dim", json!(15)), 7, &["15"]),
        ("another vocabulary", |m| config(m, "vocab_size", json!(7)), 7, &["[7, 96]", "[331, 96]"]),
        ("no positions", |m| config(m, "max_position_embeddings", json!(0)), 7, &["max_position_embeddings"]),
        ("a negative eps", |m| config(m, "rms_norm_eps", json!(-1)), 7, &["rms_norm_eps"]),
        ("an unknown activation", |m| config(m, "hidden_act", json!("magic")), 7, &["hidden_act", "silu"]),
        (
            "an unknown rope",
            |m| config(m, "rope_scaling", json!({"rope_type": "magic"})),
            7,
            &["magic", "llama3"],
        ),
        (
            "quantized by others",
            |m| config(m, "quantization_config", json!({"quant_method": "gptq"})),
            7,
            &["gptq"],
        ),
        (
            "quantization that is no object",
            |m| config(m, "quantization", json!("four")),
            7,
            &["quantization"],
        ),
        (
            "bits that do not exist",
            |m| config(m, "quantization", json!({"bits": 7, "group_size": 32})),
            7,
            &["bits"],
        ),
        ("an end of text in words", |m| config(m, "eos_token_id", json!("end")), 7, &["eos_token_id"]),
    ]
}

fn room() -> Room {
    let room = Room::new();
    room.data("data.jsonl", 8);
    std::fs::create_dir(room.path("data")).unwrap();
    room.data("data/train.jsonl", 8);
    std::fs::write(room.path("text.txt"), "the cat and the dog went home. ".repeat(10)).unwrap();
    room.model("llama", "whole");
    let train = "train --model @whole --data @data.jsonl --output @adapter --steps 1 --max-seq-length 32";
    room.run(train).succeeded("the adapter");
    room
}

#[test]
fn every_command_refuses_every_damage_and_writes_nothing() {
    let room = room();
    for (index, (damage, make, code, words)) in damages().into_iter().enumerate() {
        let _ = std::fs::remove_dir_all(room.path("model"));
        make(&room.model("llama", "model"));
        let before = room.names();
        // All damages with three commands each, so that each command meets each kind of damage.
        let chosen = (0..COMMANDS.len()).filter(|command| command % 4 == index % 4);
        for (name, arguments) in chosen.map(|command| COMMANDS[command]) {
            let name = format!("{damage}, {name}");
            room.run_with_input(arguments, "hello\n").failed(&name, code).says(&name, words);
            assert_eq!(room.names(), before, "{name}");
        }
    }
}

#[test]
fn broken_text_parts_are_refused_where_text_is_used() {
    let room = room();
    let damages: [(&str, Damage, i32); 6] = [
        ("no tokenizer", |m| std::fs::remove_file(m.join("tokenizer.json")).unwrap(), 3),
        ("a cut tokenizer", |m| std::fs::write(m.join("tokenizer.json"), "{\"model\": {").unwrap(), 7),
        ("an empty tokenizer", |m| std::fs::write(m.join("tokenizer.json"), "{}").unwrap(), 7),
        ("a foreign tokenizer", |m| edit(m, "tokenizer.json", |t| t["model"]["type"] = json!("Magic")), 7),
        ("broken settings", |m| std::fs::write(m.join("tokenizer_config.json"), "{").unwrap(), 7),
        (
            "broken generation settings",
            |m| std::fs::write(m.join("generation_config.json"), "no").unwrap(),
            7,
        ),
    ];
    for (damage, make, code) in damages {
        let _ = std::fs::remove_dir_all(room.path("model"));
        make(&room.model("llama-4bit", "model"));
        let before = room.names();
        for name in ["generate", "chat", "train", "lora", "perplexity"] {
            let arguments = COMMANDS.iter().find(|(other, _)| *other == name).unwrap().1;
            let name = format!("{damage}, {name}");
            room.run_with_input(arguments, "hello\n").failed(&name, code);
            assert_eq!(room.names(), before, "{name}");
        }
        // What needs no text goes on without a tokenizer, but not with a broken one.
        let tokens = room.run(COMMANDS[1].1);
        if code == 3 {
            tokens.succeeded(damage)
        } else {
            tokens.failed(damage, 7)
        };
    }
    let model = room.model("llama-4bit", "templated");
    std::fs::write(model.join("chat_template.jinja"), "{% for x in %}").unwrap();
    room.run("generate --model @templated --prompt a -n 1")
        .failed("template", 7)
        .says("template", &["line 1"]);
}

#[test]
fn prompts_and_tokens_that_a_model_cannot_read() {
    let room = room();
    let long = vec!["1"; 257].join(",");
    let both: &[&str] = &["257", "256"];
    let cases: [(&str, String, i32, &[&str]); 8] = [
        ("too long", format!("generate --model @whole --prompt-tokens {long} -n 1"), 2, both),
        ("too long for logits", format!("logits --model @whole --tokens {long} --output @out.npy"), 2, both),
        ("outside the vocabulary", "generate --model @whole --prompt-tokens 1,331 -n 1".into(), 2, &["331"]),
        (
            "outside, logits",
            "logits --model @whole --tokens 4294967295 --output @out.npy".into(),
            2,
            &["331"],
        ),
        ("no number", "generate --model @whole --prompt-tokens 1,x -n 1".into(), 2, &["\"x\""]),
        ("negative", "generate --model @whole --prompt-tokens=-1 -n 1".into(), 2, &["\"-1\""]),
        ("empty", "generate --model @whole --prompt-tokens= -n 1".into(), 2, &["empty"]),
        ("bench past the positions", "bench --model @whole -p 250 -g 10 -n 1".into(), 2, &["256"]),
    ];
    let before = room.names();
    for (name, arguments, code, words) in cases {
        room.run(&arguments).failed(name, code).says(name, words);
        assert_eq!(room.names(), before, "{name}");
    }
    let mut text = room.command("generate --model @whole --raw -n 1 --prompt");
    text.arg("the cat ".repeat(300));
    crate::program::Ran::of(&text.output().unwrap()).failed("long text", 2).says("long text", &["256"]);
    // Decoding behind a cache of its own has nothing to do with how long the prompt was.
    room.run("bench --model @whole -p 250 --depth 4 -g 10 -n 1").succeeded("a long prompt, decoding apart");
    // Exactly as long as it may be, it is read.
    let full = vec!["1"; 255].join(",");
    room.run(&format!("generate --model @whole --prompt-tokens {full} -n 5"))
        .succeeded("as long as possible");
}

#[test]
fn bad_data_is_named_by_file_line_and_cause() {
    let room = room();
    let deep = format!("{{\"text\": {}", "[".repeat(200_000));
    let cases: [(&str, &[u8], i32, &[&str]); 8] = [
        ("no JSON", b"{\"text\": \"a\"}\n{\"text\": \n", 7, &["line 2"]),
        ("no object", b"{\"text\": \"a\"}\n[1]\n", 7, &["line 2"]),
        ("no known column", b"{\"txt\": \"a\"}\n", 7, &["line 1", "txt"]),
        ("a number as text", b"{\"text\": 5}\n", 7, &["line 1"]),
        ("no UTF-8", b"{\"text\": \"\xff\"}\n", 7, &["line 1"]),
        ("nothing", b"", 7, &["bad.jsonl"]),
        ("a deep list", &[b'['; 200_000], 7, &["bad.jsonl"]),
        ("a deep line", deep.as_bytes(), 7, &["line 1"]),
    ];
    for (name, bytes, code, words) in cases {
        std::fs::write(room.path("bad.jsonl"), bytes).unwrap();
        let before = room.names();
        let train = "train --model @whole --data @bad.jsonl --output @out --steps 1 --max-seq-length 32";
        room.run(train).failed(name, code).says(name, words);
        assert_eq!(room.names(), before, "{name}");
    }
    std::fs::write(room.path("bad.jsonl"), "{\"text\": \"the cat went home\"}\n{\"text\": \n").unwrap();
    let train = "train --model @whole --data @bad.jsonl --output @out --steps 1 --max-seq-length 32";
    room.run(&format!("{train} --skip-bad-lines 1")).succeeded("skipped");
}

#[test]
fn adapters_that_do_not_fit() {
    let room = room();
    let adapter = |name: &str, change: &dyn Fn(&Path)| {
        let target = room.path(name);
        std::fs::create_dir(&target).unwrap();
        for file in ["adapters.safetensors", "adapter_config.json"] {
            std::fs::copy(room.path("adapter").join(file), target.join(file)).unwrap();
        }
        change(&target);
    };
    let tensors = "adapters.safetensors";
    adapter("rank", &|a| edit(a, "adapter_config.json", |c| c["lora_parameters"]["rank"] = json!(3)));
    adapter("cut", &|a| {
        let bytes = std::fs::read(a.join(tensors)).unwrap();
        std::fs::write(a.join(tensors), &bytes[..bytes.len() / 2]).unwrap();
    });
    adapter("settings", &|a| std::fs::write(a.join("adapter_config.json"), "{").unwrap());
    adapter("tensors", &|a| std::fs::remove_file(a.join(tensors)).unwrap());
    adapter("nan", &|a| {
        let mut bytes = std::fs::read(a.join(tensors)).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(a.join(tensors), bytes).unwrap();
    });
    room.model("qwen3", "other");
    let before = room.names();
    for (name, model, adapter, code) in [
        ("another rank", "whole", "rank", 7),
        ("cut tensors", "whole", "cut", 7),
        ("cut settings", "whole", "settings", 7),
        ("no tensors", "whole", "tensors", 3),
        ("NaN", "whole", "nan", 7),
        ("another model", "other", "adapter", 7),
        ("no adapter", "whole", "data", 3),
        ("nothing", "whole", "nowhere", 3),
    ] {
        for arguments in [
            format!("generate --model @{model} --adapter-path @{adapter} --prompt-tokens 1 -n 1"),
            format!("fuse --model @{model} --adapter-path @{adapter} --save-path @out"),
        ] {
            room.run(&arguments).failed(name, code);
            assert_eq!(room.names(), before, "{name}");
        }
    }
}

#[test]
fn targets_that_cannot_be_written() {
    let room = room();
    std::fs::write(room.path("file"), "kept").unwrap();
    std::fs::create_dir(room.path("filled")).unwrap();
    std::fs::write(room.path("filled/x"), "kept").unwrap();
    let convert = "convert --model @whole -q --q-group-size 32 --output";
    let fuse = "fuse --model @whole --adapter-path @adapter --save-path";
    let train = "train --model @whole --data @data.jsonl --steps 1 --max-seq-length 32 --output";
    let logits = "logits --model @whole --tokens 1,2 --output";
    let before = room.names();
    for (name, command, target, code) in [
        ("convert, filled", convert, "@filled", 2),
        ("convert, a file", convert, "@file", 2),
        ("convert, below a file", convert, "@file/out", 3),
        ("fuse, filled", fuse, "@filled", 2),
        ("train, a file", train, "@file", 3),
        ("train, a run", train, "@adapter", 2),
        ("train, below a file", train, "@file/out", 3),
        ("logits, a folder", logits, "@filled", 2),
        ("logits, a device", logits, "/dev/null", 2),
        ("train, a model", train, "@whole", 2),
        ("logits, no folder", logits, "@nowhere/x.npy", 3),
    ] {
        room.run(&format!("{command} {target}")).failed(name, code);
        assert_eq!(room.names(), before, "{name}");
        assert_eq!(std::fs::read_to_string(room.path("file")).unwrap(), "kept", "{name}");
        assert_eq!(std::fs::read_dir(room.path("filled")).unwrap().count(), 1, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn what_may_not_be_read_or_written_is_access() {
    use std::os::unix::fs::PermissionsExt;
    let room = room();
    room.model("llama", "locked");
    std::fs::create_dir(room.path("closed")).unwrap();
    let set = |name: &str, mode: u32| {
        std::fs::set_permissions(room.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set("locked/model.safetensors", 0);
    set("closed", 0o555);
    // The administrator may read and write everything.
    if std::fs::File::open(room.path("locked/model.safetensors")).is_err() {
        room.run("generate --model @locked --prompt-tokens 1 -n 1").failed("unreadable", 4);
        room.run("convert --model @whole --output @closed/out --dtype bfloat16").failed("unwritable", 4);
        room.run("train --model @whole --data @data.jsonl --output @closed/out --steps 1")
            .failed("unwritable", 4);
    }
    set("closed", 0o755);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_nothing_half_written() {
    // A limit on the size of files is the disk that a test can fill: the same answer of the system's family.
    use std::os::unix::process::CommandExt;
    let room = room();
    let before = room.names();
    for (name, arguments) in [
        ("convert", "convert --model @whole --output @out --dtype bfloat16"),
        ("train", "train --model @whole --data @data.jsonl --output @out --steps 1 --fine-tune-type full"),
        ("logits", "logits --model @whole --tokens 1,2,3,4,5,6,7,8,9,10 --output @out.npy"),
    ] {
        let mut command = room.command(arguments);
        let limit = libc::rlimit { rlim_cur: 8000, rlim_max: 8000 };
        // SAFETY: both calls may be made between fork and exec; the struct is the child's copy.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
                Ok(())
            });
        }
        crate::program::Ran::of(&command.output().unwrap()).failed(name, 6).says(name, &["space"]);
        if name == "train" {
            // The run has begun; what it could not save is not there.
            let checkpoints = std::fs::read_dir(room.path("out/checkpoints")).unwrap();
            assert_eq!(checkpoints.count(), 0, "{name}");
            std::fs::remove_dir_all(room.path("out")).unwrap();
        }
        assert_eq!(room.names(), before, "{name}");
    }
}

#[test]
fn paths_with_blanks_and_letters_of_all_kinds() {
    let room = Room::new();
    let (model, data, out) = ("ein Modell ü 模型", "dä ta.jsonl", "aus gabe/лора");
    room.model("llama", model);
    room.data(data, 6);
    let run = |program: &str, flags: &str, paths: &[(&str, &str)]| {
        let mut command = room.command(program);
        for (flag, path) in paths {
            command.arg(flag).arg(room.path(path));
        }
        command.args(flags.split(' '));
        crate::program::Ran::of(&command.output().unwrap())
    };
    let run_folder = [("--model", model), ("--data", data), ("--output", out)];
    run("train", "--steps 1 --max-seq-length 32", &run_folder).succeeded("train");
    let with = [("--model", model), ("--adapter-path", out)];
    run("generate", "--prompt-tokens 1,2 -n 1", &with).succeeded("generate");
    let fused = [("--model", model), ("--adapter-path", out), ("--save-path", "fused ✓")];
    run("fuse", "--json", &fused).succeeded("fuse");
    run("generate", "--prompt-tokens 1,2 -n 1", &[("--model", "fused ✓")]).succeeded("fused");
}

/// Replaces one value somewhere in a JSON document.
fn mutate(value: &mut Value, place: usize, new: &Value) {
    fn walk(value: &mut Value, left: &mut usize, new: &Value) -> bool {
        if *left == 0 {
            *value = new.clone();
            return true;
        }
        *left -= 1;
        match value {
            Value::Array(list) => list.iter_mut().any(|item| walk(item, left, new)),
            Value::Object(map) => map.values_mut().any(|item| walk(item, left, new)),
            _ => false,
        }
    }
    walk(value, &mut { place }, new);
}

fn strange() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({})),
        Just(json!([])),
        Just(json!(true)),
        Just(json!("")),
        Just(json!("x".repeat(70))),
        any::<i64>().prop_map(Value::from),
        (-3i64..400).prop_map(Value::from),
        any::<f64>().prop_map(|number| if number.is_finite() { json!(number) } else { json!(0.5) }),
        Just(json!([[1, -1], {"a": null}])),
    ]
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

proptest! {
    // Few, because each starts a program; PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    /// Whatever a configuration or a header says, the program answers in an orderly way.
    #[test]
    fn strange_values_are_answered(
        family in prop::sample::select(vec!["llama", "llama-4bit", "mistral", "qwen2", "qwen3", "lfm2", "lfm2-4bit"]),
        header in any::<bool>(),
        place in 1usize..60,
        new in strange(),
    ) {
        let room = Room::new();
        let model = room.model(family, "model");
        if header && weights(&model).is_file() {
            edit_weights(&model, |header, _| mutate(header, place, &new));
        } else {
            edit(&model, "config.json", |config| mutate(config, place, &new));
        }
        let ran = room.run("generate --model @model --prompt-tokens 1,2,3 -n 2");
        let name = format!("{family} header {header} place {place} {new}");
        match ran.code {
            Some(0) => {}
            Some(code @ (2 | 3 | 5 | 7)) => drop(ran.failed(&name, code)),
            _ => panic!("{name}: {:?} {}", ran.code, ran.err),
        }
    }

    /// So it is whatever bytes a file has lost or got.
    #[test]
    fn strange_bytes_are_answered(
        file in prop::sample::select(vec!["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
        cut in any::<bool>(),
    ) {
        let room = Room::new();
        let model = room.model("llama-4bit", "model");
        let mut bytes = std::fs::read(model.join(file)).unwrap();
        // In the weights, the header and what follows it.
        let end = if file == "model.safetensors" { 6000 } else { bytes.len() };
        let at = at.index(end);
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        std::fs::write(model.join(file), bytes).unwrap();
        let ran = room.run("generate --model @model --prompt cat -n 2");
        let name = format!("{file} at {at} bit {bit} cut {cut}");
        match ran.code {
            Some(0) => {}
            Some(code @ (2 | 3 | 5 | 7)) => drop(ran.failed(&name, code)),
            _ => panic!("{name}: {:?} {}", ran.code, ran.err),
        }
    }
}
