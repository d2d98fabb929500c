//! What faster arithmetic does to the model that ships: its perplexity on documents that it was not trained on.

use std::process::Command;

use mica_testkit::workspace;
use mica_tune::quickstart::corpus::{Document, document};
use serde_json::Value;

/// Largest relative change of the perplexity from exact products to faster ones.
const LIMIT: f64 = 0.005;

/// The corpus it was trained on begins with 40,000 documents; these come long after.
fn held_out() -> String {
    let texts = (100_000..100_160).map(|number| match document(0, number) {
        Document::Text(text) => text,
        Document::Chat(turns) => turns.join("\n"),
    });
    texts.collect::<Vec<_>>().join("\n\n")
}

fn mica(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_mica")).args(arguments).output().expect("mica starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn the_shipped_model_is_as_good_with_fast_products() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = path("text.txt");
    std::fs::write(&text, held_out()).unwrap();
    let base = workspace().join("crates/cli/assets/quickstart").display().to_string();
    let mut models = vec![("bf16", base.clone())];
    for mode in ["affine", "mxfp4", "mxfp8", "nvfp4"] {
        mica(&["convert", "--model", &base, "-q", "--q-mode", mode, "--output", &path(mode)]);
        models.push((mode, path(mode)));
    }
    for (name, model) in &models {
        let perplexity = |more: &[&str]| {
            let mut arguments = vec!["perplexity", "--model", model, "--file", &text, "--json"];
            arguments.extend(more);
            let document: Value = serde_json::from_slice(&mica(&arguments)).unwrap();
            // Fewer tokens would make a mean that says little.
            assert!(document["tokens"].as_u64().is_some_and(|count| count > 3000), "{name}: {document}");
            document["perplexity"].as_f64().unwrap()
        };
        let exact = perplexity(&["--exact"]);
        for (what, arguments) in [("as in training", &[][..]), ("fast", &["--fast"])] {
            let got = perplexity(arguments);
            let moved = got / exact - 1.0;
            eprintln!("{name}, {what}: {got:.3} for {exact:.3}, {:+.2} %", 100.0 * moved);
            assert!(moved.abs() <= LIMIT, "{name}, {what}: {got:.4} for {exact:.4}, {:+.3} %", 100.0 * moved);
            assert_ne!(got, exact, "{name}, {what}: the same to the last bit, so nothing was faster");
        }
    }
}
