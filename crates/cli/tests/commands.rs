//! The program from outside: exit codes, the shape of its JSON, and refusals, on the tiny models of the fixtures.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use mica_testkit::fixture;
use serde_json::Value;

fn mica(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mica")).args(arguments).output().expect("mica starts")
}

fn model(name: &str) -> String {
    fixture(format!("models/{name}")).display().to_string()
}

/// Runs with --json; stdout must be one document.
fn document(arguments: &[&str]) -> Value {
    let output = mica(arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error} in {out:?}"))
}

fn data(folder: &Path) -> String {
    let line = |i: usize| format!("{{\"text\": \"the number {i} comes before {}\"}}\n", i + 1);
    for (name, lines) in [("train", 24), ("valid", 4), ("test", 4)] {
        let text: String = (0..lines).map(line).collect();
        std::fs::write(folder.join(format!("{name}.jsonl")), text).unwrap();
    }
    folder.display().to_string()
}

#[test]
fn failures_have_their_codes() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (nowhere, bad, out) = (path("nowhere"), path("bad.jsonl"), path("run"));
    std::fs::write(&bad, "{\"text\": \"a\"}\n{\"text\": \n").unwrap();
    let with = |more: &[&str]| -> Vec<String> {
        let start = ["train", "--model", &llama, "--output", &out];
        start.iter().chain(more).map(|part| part.to_string()).collect()
    };
    let plain = |parts: &[&str]| -> Vec<String> { parts.iter().map(|part| part.to_string()).collect() };
    let cases: [(&str, Vec<String>, i32); 12] = [
        ("no command", plain(&[]), 2),
        ("unknown flag", plain(&["train", "--modell", "x"]), 2),
        ("no prompt", plain(&["generate", "--model", &llama]), 2),
        ("no such model", plain(&["generate", "--model", &nowhere, "--prompt", "a"]), 3),
        ("no model", plain(&["train", "--data", &bad]), 2),
        ("no data", with(&["--data", &nowhere]), 3),
        ("bad data", with(&["--data", &bad]), 7),
        ("no such method", with(&["--data", &bad, "--method", "magic"]), 2),
        ("optimizer", with(&["--data", &bad, "--optimizer", "lion"]), 2),
        ("nothing to resume", plain(&["train", "--resume", "--output", &nowhere]), 3),
        ("nothing to do", plain(&["lora", "--model", &llama, "--data", &bad]), 2),
        ("no text", plain(&["perplexity", "--model", &llama, "--file", &nowhere]), 3),
    ];
    for (name, arguments, code) in cases {
        let output = mica(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name}: {err}");
        assert!(!err.is_empty() && !err.contains("panicked"), "{name}: {err}");
        assert!(output.stdout.is_empty(), "{name}");
    }
}

#[test]
fn documents_have_their_fields() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let text = folder.path().join("text.txt").display().to_string();
    std::fs::write(&text, "the cat and the dog and the horse went home. ".repeat(8)).unwrap();
    let bench =
        ["bench", "--train", "--model", &llama, "--batch", "2", "--seq", "8", "--steps", "3", "--json"];
    let perplexity = ["perplexity", "--model", &llama, "--file", &text, "--length", "16", "--json"];
    let generate = ["generate", "--model", &llama, "--prompt-tokens", "1,2,3", "-n", "4", "--json"];
    let cases: [(&str, &[&str], &[&str]); 3] = [
        (
            "bench --train",
            &bench,
            &["step_s", "tokens_per_s", "labelled", "trainable", "peak_memory_gb", "loss_first", "loss_last"],
        ),
        ("perplexity", &perplexity, &["perplexity", "nll", "tokens", "stderr"]),
        ("generate", &generate, &["prompt_tokens", "prompt_tps", "generation_tps", "peak_memory_gb"]),
    ];
    for (name, arguments, fields) in cases {
        let document = document(arguments);
        for field in fields {
            assert!(document[field].as_f64().is_some_and(f64::is_finite), "{name}: {field} in {document}");
        }
    }
    // A token alone comes with the prompt and has no rate.
    let one = document(&["generate", "--model", &llama, "--prompt-tokens", "1,2,3", "-n", "1", "--json"]);
    assert!(one["generation_tps"].is_null() && one["prompt_tps"].is_number(), "{one}");
}

#[test]
fn steps_are_told_by_op_beside_the_ceilings() {
    let packed = model("qwen3-4bit");
    let decode = ["bench", "--model", &packed, "-p", "4", "-g", "4", "-n", "1", "--depth", "8", "--json"];
    let train =
        ["bench", "--train", "--model", &packed, "--batch", "1", "--seq", "8", "--steps", "1", "--json"];
    let cases: [(&str, &[&str], &[(&str, &str)]); 2] = [
        ("decode", &decode, &[("linear", "int8"), ("paged_attention", "bf16"), ("rms_norm", "")]),
        ("train", &train, &[("linear", "bf16"), ("attention_vjp", "bf16"), ("linear_cross_entropy", "bf16")]),
    ];
    for (name, arguments, expected) in cases {
        let document = document(arguments);
        let rows = document["by_op"].as_array().unwrap();
        let share: f64 = rows.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((share - 1.0).abs() < 1e-6, "{name}: shares come to {share}");
        for (op, arithmetic) in expected {
            let row = rows.iter().find(|row| row["op"] == *op && row["arithmetic"] == *arithmetic);
            let row = row.unwrap_or_else(|| panic!("{name}: no {op} in {arithmetic} in {document}"));
            for field in ["calls", "ms", "gbs", "fraction"] {
                assert!(row[field].as_f64().is_some_and(|value| value > 0.0), "{name}: {field} of {row}");
            }
            assert!(row["bound"].is_string(), "{name}: {row}");
        }
        assert!(document["ceilings"]["read_gbs"].as_f64().is_some_and(|rate| rate > 0.0), "{name}");
        if name == "decode" {
            let parts =
                ["kernels", "waiting", "graph"].map(|part| document["threads_time"][part].as_f64().unwrap());
            assert!(parts[0] > 0.0 && parts[1] >= 0.0, "{parts:?}");
            assert!((parts.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{parts:?}");
        }
    }
}

#[test]
fn what_a_bench_did_not_measure_it_leaves_out() {
    let llama = model("llama-4bit");
    let bench = |more: &str| -> Vec<String> {
        let words = format!("bench --model {llama} -p 4 -n 1 {more}");
        words.split_whitespace().map(String::from).collect()
    };
    let run = |more: &str| {
        let arguments = bench(more);
        document(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    // Nothing is decoded, behind nothing, and on too little memory for the block.
    let (nothing, empty, small) = (run("-g 0 --json"), run("-g 3 --depth 0 --json"), "--memory-limit 120MB");
    assert!(nothing["generation_tps"].is_null() && nothing["bandwidth_fraction"].is_null(), "{nothing}");
    assert!(nothing["prompt_tps"].is_number() && nothing["by_op"] == serde_json::json!([]), "{nothing}");
    assert!(nothing["threads_time"].is_null() && empty["threads_time"].is_object(), "{nothing}, {empty}");
    assert!(empty["generation_tps"].is_number() && empty["depth"] == 0, "{empty}");
    if cfg!(target_os = "linux") {
        let small = run(&format!("-g 3 --json {small}"));
        assert!(small["read_bandwidth_gbs"].is_null() && small["ceilings"]["read_gbs"].is_null(), "{small}");
        assert!(small["bandwidth_fraction"].is_null() && small["generation_tps"].is_number(), "{small}");
    }
    for more in ["-g 0".to_string(), format!("-g 3 {small}")] {
        let output = Command::new(env!("CARGO_BIN_EXE_mica")).args(bench(&more)).output().unwrap();
        let out = String::from_utf8_lossy(&output.stdout).to_string();
        assert!(output.status.success() && out.contains("prompt "), "{more}: {out}");
        assert!(
            !out.contains("NaN") && !out.contains(" 0.00 tokens/s") && !out.contains("used 0 %"),
            "{out}"
        );
    }
}

#[test]
fn a_bench_of_training_says_which_step_it_took() {
    let llama = model("llama");
    let words = ["bench", "--train", "--model", &llama, "--seq", "8", "--steps", "1", "--json"];
    let run = |more: &[&str]| document(&[&words[..], more].concat());
    let blocks = {
        let text = std::fs::read_to_string(fixture("models/llama/config.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["num_hidden_layers"].clone()
    };
    for (name, more, layers, norm) in [
        ("defaults", &[][..], &Value::from(-1), 1.0),
        ("more layers than there are", &["--num-layers", "100"], &blocks, 1.0),
        ("one, without clipping", &["--num-layers", "1", "--max-grad-norm", "0"], &Value::from(1), 0.0),
        ("all weights", &["--fine-tune-type", "full"], &Value::from(-1), 1.0),
    ] {
        let document = run(more);
        assert_eq!(document["num_layers"], *layers, "{name}");
        assert_eq!(document["max_grad_norm"], norm, "{name}");
    }
    let all = mica(&[&words[..], &["--num-layers", "100"]].concat());
    assert!(String::from_utf8_lossy(&all.stderr).contains("--num-layers 100"));
}

#[test]
fn the_doctor_keeps_to_a_limit() {
    let limited = ["doctor", "--memory-limit", "200MB"];
    let text = mica(&limited);
    let (out, json) =
        (String::from_utf8_lossy(&text.stdout), document(&[&limited[..], &["--json"]].concat()));
    assert!(text.status.success() && !out.contains("NaN"), "{out}");
    if cfg!(target_os = "linux") {
        assert!(json["read_bandwidth_gbs"].is_null(), "{json}");
        assert!(out.contains("reading not measured") && out.contains("under the limit of 0.20 GB"), "{out}");
    }
    for model in json["models"].as_array().unwrap() {
        assert_eq!(model["fits"], false, "{model}");
        assert!(model["decoding_tps_expected"].is_null() || !cfg!(target_os = "linux"), "{model}");
    }
}

#[test]
fn the_doctor_says_what_models_can_reach() {
    let document = document(&["doctor", "--json"]);
    let bandwidth = document["read_bandwidth_gbs"].as_f64().unwrap();
    let models = document["models"].as_array().unwrap();
    assert!(bandwidth > 0.0 && models.len() >= 3, "{document}");
    let of = |name: &str| models.iter().find(|model| model["shape"] == name).unwrap();
    let (small, large) = (of("Qwen3-0.6B"), of("Llama-3.1-8B"));
    let rate = small["decoding_tps_at_most"].as_f64().unwrap() * small["weights_gb"].as_f64().unwrap();
    assert!((rate / bandwidth - 1.0).abs() < 1e-6, "{small}");
    for field in ["decoding_tps_at_most", "prompt_tps_at_most", "lora_tps_at_most"] {
        // A machine without vectors has no arithmetic ceilings.
        let (small, large) = (small[field].as_f64(), large[field].as_f64());
        assert_eq!(
            small.is_some(),
            document["ceilings"]["int8_gops"].is_number() || field.starts_with("dec")
        );
        assert!(
            small.zip(large).is_none_or(|(small, large)| small > 5.0 * large),
            "{field}: {small:?} {large:?}"
        );
    }
}

/// A short tour: the shipped base answers nothing as asked, and what it leaves can be used.
#[test]
fn the_quickstart_asks_trains_and_asks_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("tour").display().to_string();
    let tour = ["quickstart", "--steps", "3", "--questions", "20", "--output", &out, "--json"];
    let report = document(&tour);
    for field in ["loss_first", "loss_last", "tokens_per_s", "peak_memory_gb", "seconds"] {
        assert!(report[field].as_f64().is_some_and(f64::is_finite), "{field} in {report}");
    }
    assert_eq!((&report["questions"], &report["accuracy_before"]), (&20.into(), &0.0.into()), "{report}");
    assert!(report["accuracy_after"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{report}");
    assert!(folder.path().join("tour/loss.svg").is_file());
    let (base, adapter) = (format!("{out}/base"), format!("{out}/adapter"));
    let generate =
        ["generate", "--model", &base, "--adapter-path", &adapter, "--prompt", "Hello", "-n", "2", "--json"];
    assert!(document(&generate)["text"].is_string());
    // What an earlier tour left is replaced, and nonsense is refused before anything is done.
    assert!(mica(&tour).status.success());
    for flag in ["--steps", "--questions"] {
        let output = mica(&["quickstart", flag, "0", "--output", &format!("{out}-none")]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(!folder.path().join("tour-none").exists(), "{flag}");
    }
}

#[test]
fn perplexity_is_the_same_in_all_windows_that_hold_the_text() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let text = folder.path().join("text.txt").display().to_string();
    std::fs::write(&text, "the cat and").unwrap();
    let nll = |length: &str| {
        let arguments = ["perplexity", "--model", &llama, "--file", &text, "--length", length, "--json"];
        document(&arguments)["nll"].as_f64().unwrap()
    };
    assert_eq!(nll("32"), nll("48"));
}

#[test]
fn a_run_is_finished_resumed_and_used() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let data = data(folder.path());
    let out = folder.path().join("run").display().to_string();
    let run = |more: &[&str]| {
        let mut all = vec!["train", "--model", &llama, "--data", &data, "--output", &out];
        all.extend(["--batch-size", "4", "--max-seq-length", "32", "--steps", "3", "--json"]);
        all.extend(more);
        mica(&all)
    };
    let first = run(&[]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let summary: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(summary["steps"], 3);
    for file in ["config.yaml", "metrics.jsonl", "loss.svg", "adapters.safetensors", "adapter_config.json"] {
        assert!(folder.path().join("run").join(file).is_file(), "{file}");
    }
    let metrics = || std::fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let written = metrics();
    assert_eq!(written.lines().count(), 3);
    // A second run does not overwrite it, nor does one with other settings go on with it.
    assert_ne!(run(&[]).status.code(), Some(0));
    assert_eq!(run(&["--resume", "--seed", "7"]).status.code(), Some(2));
    assert!(run(&["--resume"]).status.success());
    assert!(mica(&["train", "--resume", "--output", &out]).status.success());
    assert_eq!(metrics(), written);
    let prompt = ["--prompt-tokens", "1,2", "-n", "2", "--json"];
    let mut generate = vec!["generate", "--model", &llama, "--adapter-path", &out];
    generate.extend(prompt);
    assert!(document(&generate)["tokens"].as_array().is_some_and(|tokens| !tokens.is_empty()));
}

#[test]
fn mlx_lms_command_reports_and_tests() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let data = data(folder.path());
    let out = folder.path().join("adapters").display().to_string();
    let mut arguments = vec!["lora", "--model", &llama, "--train", "--test", "--data", &data];
    arguments.extend(["--adapter-path", &out, "--iters", "4", "--batch-size", "2", "--save-every", "2"]);
    arguments.extend(["--steps-per-report", "2", "--max-seq-length", "32", "--learning-rate", "1e-3"]);
    let output = mica(&arguments);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    let parts = [
        "Iter 2: Train loss ",
        "Iter 4: Train loss ",
        "Iter 1: Val loss ",
        "Iter 4: Val loss ",
        "Test loss ",
        "Saved adapter weights",
    ];
    for part in parts {
        assert!(err.contains(part), "{part} in {err}");
    }
    for file in ["adapters.safetensors", "0000002_adapters.safetensors", "0000004_adapters.safetensors"] {
        assert!(folder.path().join("adapters").join(file).is_file(), "{file}");
    }
}

#[test]
fn piped_chat_answers_and_obeys() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("talk.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["chat", "--model", &model("llama-4bit"), "-n", "4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = format!("one\\\ntwo\n/save {}\n/exit\nnever\n", saved.display());
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
    let talk: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(talk["messages"][0]["content"], "one\ntwo");
    assert_eq!(talk["messages"].as_array().unwrap().len(), 2);
}

#[test]
fn keys_and_values_in_codes_are_near_and_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = (1..60).map(|i| (i * 7 % 50).to_string()).collect::<Vec<_>>().join(",");
    for name in ["llama", "qwen3-4bit"] {
        let model = model(name);
        let logits = |more: &[&str]| -> Vec<f32> {
            let file = folder.path().join("logits.npy").display().to_string();
            let start = ["logits", "--exact", "--model", &model, "--tokens", &tokens, "--output", &file];
            let output = mica(&start.iter().chain(more).copied().collect::<Vec<_>>());
            assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
            mica_array::files::load_npy(&file).unwrap().to_vec::<f32>().unwrap()
        };
        let exact = logits(&[]);
        let [eight, four] =
            [logits(&["--kv-bits", "8"]), logits(&["--kv-bits", "4", "--kv-group-size", "32"])]
                .map(|got| mica_testkit::relative_l2(&got, &exact));
        assert!(0.0 < eight && eight < 0.01, "{name}, 8 bits: {eight}");
        assert!(eight < four && four < 0.15, "{name}, 4 bits: {four}");
    }
    let model = model("llama");
    for (bits, more) in [("5", &[][..]), ("8", &["--kv-group-size", "48"]), ("0", &[])] {
        let arguments = ["generate", "--model", &model, "--prompt", "a", "--kv-bits", bits];
        let output = mica(&arguments.iter().chain(more).copied().collect::<Vec<_>>());
        let said = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(2), "{bits}: {said}");
        assert!(said.contains("expected 4 or 8 bits and groups of 32, 64 or 128"), "{said}");
    }
    let alone = mica(&["generate", "--model", &model, "--prompt", "a", "--kv-group-size", "64"]);
    assert_eq!(alone.status.code(), Some(2), "a group size means nothing without --kv-bits");
}
