//! Results as a table for people and as JSON for programs, with the facts of the machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use mica_ceiling::processor;
use serde_json::{Value, json};

/// All results of a run.
pub struct Table {
    date: String,
    /// What follows the date in the names of the files.
    ending: &'static str,
    /// A line under the facts that says how it was measured.
    method: &'static str,
    /// What the rows come to, in words and as JSON.
    pub summary: Vec<(String, Value)>,
    /// What the machine and the program are.
    facts: Vec<(String, String)>,
    pub rows: Vec<Row>,
    /// What was to be measured and could not be, with the reason.
    pub failures: Vec<String>,
}

/// One thing that was measured.
pub struct Row {
    pub name: String,
    pub unit: &'static str,
    /// mica's median.
    pub mica: f64,
    /// Read bandwidth in GB/s that mica measured beside its runs.
    pub bandwidth: Option<f64>,
    /// The part of it that mica used, taken run by run.
    pub used: Option<f64>,
    pub peers: Vec<Cell>,
    /// The figures of all rounds.
    pub all: Value,
}

/// A peer's result.
pub struct Cell {
    pub program: String,
    pub figure: f64,
    /// How many times as fast mica is, or as small.
    pub ratio: f64,
}

/// The median of at least one round.
pub fn median(values: Vec<f64>) -> f64 {
    mica_ceiling::median(values).expect("there is a round")
}

/// What a program prints, if anything.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string()).filter(|text| !text.is_empty())
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: mica {:.2} {}", self.name, self.mica, self.unit)?;
        for Cell { program, figure, ratio } in &self.peers {
            let better = if self.unit == "GB" { "small" } else { "fast" };
            write!(f, "; {program} {figure:.2}, mica is {ratio:.2} times as {better}")?;
        }
        Ok(())
    }
}

impl Table {
    /// An empty table with the facts of this machine.
    pub fn new(mica: &Path, threads: usize) -> anyhow::Result<Table> {
        let facts = [
            ("processor", processor()),
            ("cores", std::thread::available_parallelism().ok().map(|n| n.to_string())),
            ("threads used", Some(threads.to_string())),
            ("commit", said("git", &["rev-parse", "--short", "HEAD"])),
            ("mica", said(&mica.display().to_string(), &["--version"])),
        ];
        Ok(Table {
            date: chrono::Local::now().format("%Y-%m-%d-%H%M").to_string(),
            ending: "",
            method: "Medians of alternating rounds; a ratio is taken within its round. Bandwidth is what the same threads read beside mica's runs.",
            summary: Vec::new(),
            facts: facts.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect(),
            rows: Vec::new(),
            failures: Vec::new(),
        })
    }

    /// A table without facts.
    #[cfg(test)]
    pub fn empty() -> Table {
        Table {
            date: "today".into(),
            ending: "",
            method: "",
            summary: Vec::new(),
            facts: Vec::new(),
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// The same under another file name and with its own words on the method.
    pub fn with(self, ending: &'static str, method: &'static str) -> Table {
        Table { ending, method, ..self }
    }

    /// One more fact.
    pub fn fact(&mut self, name: &str, value: impl ToString) {
        self.facts.push((name.to_string(), value.to_string()));
    }

    /// The same, unless a fact has that name.
    pub fn fact_once(&mut self, name: &str, value: impl ToString) {
        if self.facts.iter().all(|(known, _)| known != name) {
            self.fact(name, value);
        }
    }

    /// Writes DATE.md and DATE.json, or DATE-ENDING.md and .json, and prints where.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        for path in self.save(folder)? {
            println!("{}", path.display());
        }
        Ok(())
    }

    /// Writes the files and says where they are; a later call takes their place.
    pub fn save(&self, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder)?;
        let mut paths = Vec::new();
        for (ending, text) in [("md", self.markdown()), ("json", format!("{:#}\n", self.json()))] {
            let dash = if self.ending.is_empty() { "" } else { "-" };
            let path = folder.join(format!("{}{dash}{}.{ending}", self.date, self.ending));
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            paths.push(path);
        }
        Ok(paths)
    }

    pub fn markdown(&self) -> String {
        let mut text = format!("# Side by side, {}\n\n", self.date);
        for (name, value) in &self.facts {
            text += &format!("- {name}: {value}\n");
        }
        text += &format!("\n{}\n\n", self.method);
        for (name, value) in &self.summary {
            text += &match (value.as_f64(), value.as_str()) {
                (Some(number), _) => format!("- {name}: {number:.2}\n"),
                (_, words) => format!("- {name}: {}\n", words.unwrap_or_default()),
            };
        }
        text += if self.summary.is_empty() { "" } else { "\n" };
        text += "| | mica | read GB/s | of it used | peer | | mica is so many times as fast (or as small) |\n|---|---|---|---|---|---|---|\n";
        for row in &self.rows {
            let bandwidth = row.bandwidth.map_or(String::new(), |gbs| format!("{gbs:.1}"));
            let used = row.used.map_or(String::new(), |part| format!("{:.0} %", 100.0 * part));
            let start = format!("| {} | {:.2} {} | {bandwidth} | {used} ", row.name, row.mica, row.unit);
            if row.peers.is_empty() {
                text += &format!("{start}| | | |\n");
            }
            for Cell { program, figure, ratio } in &row.peers {
                text += &format!("{start}| {program} | {figure:.2} {} | {ratio:.2} |\n", row.unit);
            }
        }
        if !self.failures.is_empty() {
            text += "\nWhat failed:\n\n";
        }
        for failure in &self.failures {
            text += &format!("- {}\n", failure.replace('\n', " "));
        }
        text
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let peers: Vec<Value> = row
                .peers
                .iter()
                .map(|cell| json!({"program": cell.program, "figure": cell.figure, "ratio": cell.ratio}))
                .collect();
            json!({"name": row.name, "unit": row.unit, "mica": row.mica, "read_bandwidth_gbs": row.bandwidth, "bandwidth_fraction": row.used, "peers": peers, "rounds": row.all})
        });
        let facts: serde_json::Map<String, Value> =
            self.facts.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let mut document = json!({"date": self.date, "machine": facts});
        if !self.summary.is_empty() {
            document["summary"] = json!(self.summary.iter().cloned().collect::<serde_json::Map<_, _>>());
        }
        document["rows"] = json!(rows.collect::<Vec<_>>());
        if !self.failures.is_empty() {
            document["failures"] = json!(self.failures);
        }
        document
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_a_line_per_peer() {
        let cell = |program: &str, figure, ratio| Cell { program: program.into(), figure, ratio };
        let rows = vec![
            Row {
                name: "decode".into(),
                unit: "tokens/s",
                mica: 40.0,
                bandwidth: Some(20.0),
                used: Some(0.8),
                peers: vec![cell("a", 20.0, 2.0), cell("b", 10.0, 4.0)],
                all: json!({}),
            },
            Row {
                name: "step".into(),
                unit: "s",
                mica: 7.0,
                bandwidth: None,
                used: None,
                peers: vec![],
                all: json!({}),
            },
        ];
        let summary = vec![("mean".to_string(), json!(2.5)), ("worst".to_string(), json!("decode"))];
        let facts = vec![("cores".into(), "2".into())];
        let failures = vec!["step: b: out of\nmemory".to_string()];
        let table = Table { method: "By eye.", summary, facts, rows, failures, ..Table::empty() };
        let text = table.markdown();
        let lines: Vec<&str> =
            text.lines().filter(|line| line.starts_with("| decode") || line.starts_with("| step")).collect();
        assert_eq!(
            lines,
            [
                "| decode | 40.00 tokens/s | 20.0 | 80 % | a | 20.00 tokens/s | 2.00 |",
                "| decode | 40.00 tokens/s | 20.0 | 80 % | b | 10.00 tokens/s | 4.00 |",
                "| step | 7.00 s |  |  | | | |",
            ]
        );
        assert!(text.ends_with("\nWhat failed:\n\n- step: b: out of memory\n"), "{text}");
        assert_eq!(table.json()["failures"][0], "step: b: out of\nmemory");
        assert!(text.contains("By eye.\n\n- mean: 2.50\n- worst: decode\n"), "{text}");
        assert_eq!(table.json()["rows"][0]["peers"][1]["ratio"], 4.0);
    }
}
