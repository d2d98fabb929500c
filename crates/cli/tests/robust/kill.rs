//! Runs that are killed, interrupted and damaged, and go on.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::program::{Ran, Room};

/// Steps and their numbers, without what depends on the clock.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            for clock in ["tokens_per_s", "it_per_s", "seconds", "peak_memory_gb"] {
                line.as_object_mut().unwrap().remove(clock).unwrap();
            }
            line
        })
        .collect()
}

/// As exact text: numbers of JSON are written so that they come back the same.
fn exact(run: &Path) -> Vec<String> {
    metrics(run).iter().map(Value::to_string).collect()
}

fn start(room: &Room, arguments: &str) -> Child {
    let mut command = room.command(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until a run has taken so many steps; fails if it ends before.
fn wait_for_steps(child: &mut Child, run: &Path, steps: usize) {
    let begun = Instant::now();
    loop {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= steps {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was disturbed");
        assert!(begun.elapsed() < Duration::from_secs(300), "the run takes no steps");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: sends a signal to a child that was not waited for yet.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// A generator for the moments of kills, from the clock; its seed is printed, and can be given again.
struct Moments(u64);

impl Moments {
    fn new() -> Moments {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let given = std::env::var("MICA_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or(clock) | 1;
        println!("MICA_TEST_SEED={seed}");
        Moments(seed)
    }

    /// Below a limit.
    fn next(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }
}

#[test]
fn killed_runs_go_on_bit_for_bit() {
    const KILLS: usize = 5;
    let room = Room::new();
    room.data("train.jsonl", 40);
    std::fs::create_dir(room.path("data")).unwrap();
    for (name, lines) in [("train", 40), ("valid", 6), ("test", 6)] {
        room.data(&format!("data/{name}.jsonl"), lines);
    }
    for model in ["llama", "llama-4bit", "llama-8bit"] {
        room.model(model, model);
    }
    let cases = [
        (
            "LoRA with dropout, accumulation, packing and validation",
            "train --model @llama --data @data --steps 24 --max-seq-length 64 --batch-size 4 --micro-batch-size 2 \
             --lora-dropout 0.1 --eval-every 5 --save-every 1 --output",
        ),
        (
            "all weights, without packing",
            "train --model @llama --data @train.jsonl --steps 16 --max-seq-length 48 --batch-size 4 \
             --fine-tune-type full --packing false --save-every 2 --hold-out 4 --eval-every 4 --output",
        ),
        (
            "DoRA on a quantized base, with recomputing",
            "train --model @llama-8bit --data @data --epochs 2 --max-seq-length 48 --batch-size 8 \
             --micro-batch-size 4 --fine-tune-type dora --grad-checkpoint --save-every 1 --output",
        ),
        (
            "mlx-lm's command, with a partial last window",
            "lora --model @llama-4bit --train --data @data --iters 31 --batch-size 2 --grad-accumulation-steps 3 \
             --steps-per-eval 7 --save-every 2 --max-seq-length 48 --learning-rate 1e-3 --adapter-path",
        ),
    ];
    let mut moments = Moments::new();
    for (number, (name, arguments)) in cases.into_iter().enumerate() {
        let (whole, killed) = (format!("whole-{number}"), format!("killed-{number}"));
        let begun = Instant::now();
        room.run(&format!("{arguments} @{whole}")).succeeded(name);
        let length = begun.elapsed().as_micros() as u64;
        let expected = exact(&room.path(&whole));
        let mut kills = 0;
        // One that comes too late finds the run finished; resuming a finished run changes nothing.
        for attempt in 0.. {
            let threads = 1 + attempt % 2;
            let mut child = start(&room, &format!("{arguments} @{killed} --resume --threads {threads}"));
            if kills == KILLS {
                Ran::of(&child.wait_with_output().unwrap()).succeeded(name);
                break;
            }
            std::thread::sleep(Duration::from_micros(moments.next(length)));
            child.kill().unwrap();
            let ran = Ran::of(&child.wait_with_output().unwrap());
            match ran.code {
                None => kills += 1,
                Some(_) => drop(ran.succeeded(name)),
            }
            assert!(attempt < 200, "{name}: the run is always finished before it can be killed");
            if ran.code.is_some() {
                // Finished: the next attempts are undisturbed repetitions of nothing, so begin it anew.
                assert_eq!(exact(&room.path(&killed)), expected, "{name}");
                std::fs::remove_dir_all(room.path(&killed)).unwrap();
            }
        }
        assert_eq!(exact(&room.path(&killed)), expected, "{name}");
        let steps: Vec<u64> =
            metrics(&room.path(&killed)).iter().map(|l| l["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "{name}");
        let result = |run: &str| {
            let files = ["adapters.safetensors", "model.safetensors"].map(|file| room.path(run).join(file));
            std::fs::read(files.iter().find(|file| file.is_file()).expect("what was trained")).unwrap()
        };
        assert!(result(&whole) == result(&killed), "{name}: the results differ");
        let left = std::fs::read_dir(room.path(&killed).join("checkpoints")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name.to_string_lossy().starts_with("step-")), "{name}: {left:?}");
    }
}

const ENDLESS: &str = "train --model @llama --data @data.jsonl --steps 1000000 --max-seq-length 32 --batch-size 2 --lr-schedule constant \
     --output @run";

#[test]
fn an_interrupt_saves_and_the_run_goes_on() {
    let room = Room::new();
    room.data("data.jsonl", 12);
    room.model("llama", "llama");
    for (name, number, code) in [("SIGINT", libc::SIGINT, 75), ("SIGTERM", libc::SIGTERM, 143)] {
        let mut child = start(&room, ENDLESS);
        wait_for_steps(&mut child, &room.path("run"), 3);
        signal(&child, number);
        let ran = Ran::of(&child.wait_with_output().unwrap());
        ran.failed(name, code).says(name, &["saved", "mica train --resume --output"]);
        let done = metrics(&room.path("run"));
        let steps = done.len() + 3;
        let more = ENDLESS.replace("1000000", &steps.to_string());
        room.run(&format!("{more} --resume")).succeeded(name);
        let lines = metrics(&room.path("run"));
        assert_eq!(lines[..done.len()], done, "{name}");
        assert_eq!(lines.len(), steps, "{name}");
        std::fs::remove_dir_all(room.path("run")).unwrap();
    }
}

#[test]
fn a_second_interrupt_ends_at_once() {
    let room = Room::new();
    room.data("data.jsonl", 12);
    room.model("llama", "llama");
    let mut child = start(&room, ENDLESS);
    wait_for_steps(&mut child, &room.path("run"), 3);
    // Both are pending when the program is next heard of, or the second comes while it saves.
    signal(&child, libc::SIGSTOP);
    signal(&child, libc::SIGINT);
    signal(&child, libc::SIGCONT);
    signal(&child, libc::SIGINT);
    let code = child.wait().unwrap().code();
    // Signals of one number that are pending at once are one.
    assert!(matches!(code, Some(130 | 75)), "{code:?}");
    room.run(&format!("{} --resume", ENDLESS.replace("1000000", "3"))).succeeded("and it goes on");
}

#[test]
fn damaged_checkpoints_are_passed_over_aloud_or_refused() {
    let room = Room::new();
    room.data("data.jsonl", 12);
    room.model("llama", "llama");
    let arguments = "train --model @llama --data @data.jsonl --max-seq-length 32 --batch-size 2 --save-every 2 \
                     --lr-schedule constant --output";
    room.run(&format!("{arguments} @whole --steps 8")).succeeded("undisturbed");
    let flip = |step: usize, file: &str| {
        let path = room.path(&format!("run/checkpoints/step-{step}/{file}"));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(path, bytes).unwrap();
    };
    for file in ["weights.safetensors", "optimizer.safetensors", "state.json"] {
        room.run(&format!("{arguments} @run --steps 6")).succeeded(file);
        flip(6, file);
        let ran = room.run(&format!("{arguments} @run --steps 8 --resume"));
        ran.succeeded(file).says(file, &["passed over", "step-6"]);
        assert_eq!(exact(&room.path("run")), exact(&room.path("whole")), "{file}");
        flip(6, file);
        flip(8, file);
        let before = std::fs::read(room.path("run/metrics.jsonl")).unwrap();
        // Steps 6 and 8 are kept. The one of step 6 was made again, so one flip damages it.
        let ran = room.run(&format!("{arguments} @run --steps 10 --resume"));
        ran.failed(file, 8).says(file, &["no checkpoint is whole", "step-6", "step-8"]);
        assert_eq!(std::fs::read(room.path("run/metrics.jsonl")).unwrap(), before, "{file}");
        std::fs::remove_dir_all(room.path("run")).unwrap();
    }
}

#[test]
fn what_cannot_be_resumed_says_why() {
    let room = Room::new();
    room.data("data.jsonl", 12);
    room.data("other.jsonl", 13);
    room.model("llama", "llama");
    let arguments = "train --model @llama --max-seq-length 32 --batch-size 2 --output @run";
    room.run(&format!("{arguments} --data @data.jsonl --steps 2")).succeeded("the run");
    let again = |more: &str| room.run(&format!("{arguments} --steps 4 --resume {more}"));
    again("--data @other.jsonl").failed("other data", 2).says("other data", &["data"]);
    again("--data @data.jsonl --seed 5").failed("another seed", 2).says("another seed", &["seed"]);
    again("--data @data.jsonl --rank 3").failed("another rank", 2).says("another rank", &["adapter"]);
    std::fs::copy(room.path("other.jsonl"), room.path("data.jsonl")).unwrap();
    again("--data @data.jsonl").failed("changed data", 2).says("changed data", &["changed since"]);
    room.data("data.jsonl", 12);
    again("--data @data.jsonl").succeeded("the same data");
    room.run("train --resume --output @nowhere").failed("no run", 3);
}
