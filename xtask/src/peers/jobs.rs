//! What is measured: for every shape its jobs, and for every job the programs with their options.
//!
//! A job is one set of processes, from which one or several figures are taken. Which peers take part depends on
//! what benches/peers/setup.sh has installed: what is not there is left out.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;

use super::program::{PROCESS_S, Program};

/// Programs that run alternately, and what is read from them.
pub struct Job {
    pub figures: Vec<Figure>,
    /// mica comes first.
    pub programs: Vec<Program>,
    /// Every program runs once before the rounds.
    pub settled: bool,
}

/// A row of the table.
pub struct Figure {
    pub name: String,
    pub unit: Unit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    TokensPerSecond,
    Seconds,
    Gigabytes,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::TokensPerSecond => "tokens/s",
            Unit::Seconds => "s",
            Unit::Gigabytes => "GB",
        }
    }

    pub fn more_is_better(self) -> bool {
        self == Unit::TokensPerSecond
    }
}

/// Shapes that are measured where none is named, if their files are there.
const SHAPES: [&str; 4] = ["qwen3-0.6b", "llama-1b", "llama-8b", "tiny"];

/// Where the programs and models are.
pub struct Setup {
    mica: PathBuf,
    models: PathBuf,
    threads: usize,
    llama: Peer,
    openvino: Peer,
    torch: Peer,
}

/// An environment of setup.sh, and the script in benches/peers that it runs.
struct Peer {
    name: &'static str,
    script: &'static str,
    /// None where it was not set up.
    python: Option<PathBuf>,
}

impl Peer {
    fn find(folder: &Path, name: &'static str, script: &'static str) -> Peer {
        let python = folder.join("env").join(name).join("bin/python");
        if !python.exists() {
            eprintln!("{name} is left out: there is no {}", python.display());
        }
        Peer { name, script, python: python.exists().then_some(python) }
    }
}

impl Setup {
    /// Looks for the peers in the folder that setup.sh made.
    pub fn open(folder: &Path, mica: &Path, threads: usize) -> anyhow::Result<Setup> {
        let models = folder.join("models");
        ensure!(models.is_dir(), "{} is no folder: run benches/peers/setup.sh", models.display());
        ensure!(Path::new("benches/peers").is_dir(), "run this in the root of the repository");
        Ok(Setup {
            mica: mica.to_path_buf(),
            models,
            threads,
            llama: Peer::find(folder, "llama", "llama_cpp_speed.py"),
            openvino: Peer::find(folder, "openvino", "openvino_speed.py"),
            torch: Peer::find(folder, "torch", "torch_train_speed.py"),
        })
    }

    /// The shapes that are there.
    pub fn shapes(&self) -> Vec<String> {
        let there = |shape: &&str| self.float(shape).is_dir() || self.quantized(shape).is_dir();
        SHAPES.into_iter().filter(there).map(String::from).collect()
    }

    fn float(&self, shape: &str) -> PathBuf {
        self.models.join(shape)
    }

    fn quantized(&self, shape: &str) -> PathBuf {
        self.models.join(format!("{shape}-4bit"))
    }

    fn gguf(&self, shape: &str) -> PathBuf {
        self.models.join(format!("{shape}-q4_0.gguf"))
    }

    /// What is measured on a shape. One that is there in 4 bits alone is too large for the others: it has the rows
    /// of a prompt and of decoding.
    pub fn jobs(&self, shape: &str) -> anyhow::Result<Vec<Job>> {
        let (float, quantized) = (self.float(shape), self.quantized(shape));
        ensure!(
            float.is_dir() || quantized.is_dir(),
            "{} is no folder: run benches/peers/setup.sh with {shape}",
            float.display()
        );
        if shape == "tiny" {
            return Ok(vec![self.full(shape, None), self.full(shape, Some(0.4))]);
        }
        if !quantized.is_dir() {
            let mut convert = Command::new(&self.mica);
            convert.args(["convert", "-q", "--q-bits", "4", "--model"]);
            convert.arg(&float).arg("--output").arg(&quantized);
            ensure!(convert.status()?.success(), "mica convert failed");
        }
        let large = !float.is_dir();
        let mut jobs = Vec::new();
        for prompt in [512, 4096] {
            // A depth of its own spares mica one more reading of the prompt.
            let options = format!("-p {prompt} --depth 1 -g 1 -n 1");
            jobs.push(self.inference(shape, &format!("prefill {prompt}"), "prompt_tps", &options));
        }
        for depth in [64, 512, 4096] {
            let options = format!("-p 1 --depth {depth} -g 64 -n 1");
            jobs.push(self.inference(shape, &format!("decode at depth {depth}"), "generation_tps", &options));
        }
        if large {
            return Ok(jobs);
        }
        for batch in [4, 8] {
            let options = format!("-p 1 --depth 64 -g 32 -n 1 --batch {batch}");
            jobs.push(self.inference(
                shape,
                &format!("decode of {batch} sequences"),
                "generation_tps",
                &options,
            ));
        }
        jobs.push(self.first_token(shape));
        jobs.push(self.lora(shape, None));
        jobs.push(self.lora(shape, Some(0.4)));
        Ok(jobs)
    }

    /// Prefill or decoding with 4-bit weights.
    fn inference(&self, shape: &str, name: &str, field: &'static str, options: &str) -> Job {
        let mut programs =
            vec![self.mica(&format!("bench --json {options}"), &self.quantized(shape), &[field])];
        let converted = self.models.join(format!("{shape}-openvino"));
        programs.extend(self.script("llama.cpp Q4_0", &self.llama, &self.gguf(shape), options, &[field]));
        programs.extend(self.script("OpenVINO int4", &self.openvino, &converted, options, &[field]));
        let figures = vec![Figure { name: format!("{shape}, {name}, 4 bits"), unit: Unit::TokensPerSecond }];
        Job { figures, programs, settled: false }
    }

    /// From the start of a process to the end of its first token. The peer's script is counted twice, as a process
    /// and without the start of Python, which a program in C++ would not need.
    fn first_token(&self, shape: &str) -> Job {
        const PROMPT: usize = 32;
        let tokens: Vec<String> = (0..PROMPT).map(|i| (i * 7919 % 15_000 + 10).to_string()).collect();
        let words = format!("generate --json -n 1 --prompt-tokens {}", tokens.join(","));
        let mut programs = vec![self.mica(&words, &self.quantized(shape), &[PROCESS_S])];
        let options = format!("-p {PROMPT} --first-token");
        for (name, field) in
            [("llama.cpp Q4_0", PROCESS_S), ("llama.cpp Q4_0, Python running", "first_token_s")]
        {
            programs.extend(self.script(name, &self.llama, &self.gguf(shape), &options, &[field]));
        }
        let name = format!("{shape}, first token of a process, prompt of {PROMPT}, 4 bits");
        Job { figures: vec![Figure { name, unit: Unit::Seconds }], programs, settled: true }
    }

    fn lora(&self, shape: &str, labelled: Option<f64>) -> Job {
        let options =
            "--fine-tune-type lora --batch 1 --seq 1024 --steps 3 --num-layers 16 --lora-keys q_proj,v_proj";
        self.training(&format!("{shape}, LoRA step of 1 x 1024"), shape, "torch + peft", options, labelled)
    }

    fn full(&self, shape: &str, labelled: Option<f64>) -> Job {
        let options = "--fine-tune-type full --batch 16 --seq 512 --steps 3";
        self.training(&format!("{shape}, full training step of 16 x 512"), shape, "torch", options, labelled)
    }

    /// Steps on float weights, in bf16; `labelled` is the part of the tokens that are learnt.
    fn training(&self, name: &str, shape: &str, peer: &str, options: &str, labelled: Option<f64>) -> Job {
        const FIELDS: [&str; 2] = ["step_s", "peak_memory_gb"];
        let (mut name, mut options) = (format!("{name}, bf16"), options.to_string());
        if let Some(part) = labelled {
            name += &format!(", {:.0} % labelled", 100.0 * part);
            options += &format!(" --labelled {part}");
        }
        let model = self.float(shape);
        // The peers' steps do not clip.
        let words = format!("bench --train --json --max-grad-norm 0 {options}");
        let mut programs = vec![self.mica(&words, &model, &FIELDS)];
        programs.extend(self.script(peer, &self.torch, &model, &options, &FIELDS));
        let memory = Figure { name: format!("{name}, peak memory"), unit: Unit::Gigabytes };
        Job { figures: vec![Figure { name, unit: Unit::Seconds }, memory], programs, settled: false }
    }

    fn mica(&self, words: &str, model: &Path, fields: &[&'static str]) -> Program {
        let mut command = vec![self.mica.display().to_string()];
        command.extend(words.split_whitespace().map(String::from));
        command.extend(["--model".into(), model.display().to_string()]);
        command.extend(["--threads".into(), self.threads.to_string()]);
        Program { name: "mica".into(), peer: "mica", command, fields: fields.to_vec() }
    }

    /// A peer that opens `model`, if both are there.
    fn script(
        &self,
        name: &str,
        peer: &Peer,
        model: &Path,
        options: &str,
        fields: &[&'static str],
    ) -> Option<Program> {
        let python = peer.python.as_ref()?;
        if !model.exists() {
            eprintln!("{name} is left out of a row: there is no {}", model.display());
            return None;
        }
        let mut command = vec![python.display().to_string(), format!("benches/peers/{}", peer.script)];
        command.push(model.display().to_string());
        command.extend(options.split_whitespace().map(String::from));
        command.extend(["--threads".into(), self.threads.to_string()]);
        Some(Program { name: name.into(), peer: peer.name, command, fields: fields.to_vec() })
    }
}
