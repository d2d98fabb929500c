//! `mica chat`: a conversation, with history, multi-line input and /commands.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_lm::chat::{ChatRequest, ChatTemplate, Message};
use mica_lm::generate::Generator;
use mica_lm::load::Loaded;
use mica_lm::tokenizer::Tokenizer;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::{ModelArgs, SamplingArgs};
use crate::exit::Usage;

const HELP: &str = "\
/help            this list
/clear           forget the conversation
/system [TEXT]   set the system message (and forget the conversation); without TEXT, remove it
/save FILE       write the conversation as a line of JSON, as mica train reads it
/exit            leave (also Ctrl-D)
A line that ends with \\ goes on in the next one.";

/// Talk with a model
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    system_prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let loaded = args.model.open()?;
    let tokenizer = Tokenizer::load(&loaded.folder)?;
    let template = ChatTemplate::load(&loaded.folder)?.ok_or_else(|| {
        Usage("the model has no chat template; use mica generate with a plain prompt".to_string())
    })?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut chat =
        Chat { args: &args, loaded, tokenizer, template, system: None, messages: Vec::new(), stop };
    chat.system = args.system_prompt.clone();
    if std::io::stdin().is_terminal() { from_terminal(&mut chat) } else { from_pipe(&mut chat) }
}

struct Chat<'a> {
    args: &'a Args,
    loaded: Loaded,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: Option<String>,
    messages: Vec<Message>,
    /// Set by Ctrl-C on a terminal: the answer ends here.
    stop: Arc<AtomicBool>,
}

/// Whether the conversation goes on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Go,
    Leave,
}

fn from_terminal(chat: &mut Chat) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new()?;
    // While a line is edited Ctrl-C is a key; while an answer is written it ends the answer, and twice the program.
    #[cfg(unix)]
    {
        use signal_hook::{consts::SIGINT, flag};
        flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&chat.stop))?;
        flag::register(SIGINT, Arc::clone(&chat.stop))?;
    }
    let history = history_file();
    if let Some(history) = &history {
        // There is none the first time.
        let _ = editor.load_history(history);
    }
    eprintln!("{} — /help shows the commands", chat.args.model.model);
    let mut text = String::new();
    loop {
        match editor.readline(if text.is_empty() { "> " } else { "… " }) {
            Ok(line) => {
                if add(&mut text, &line) {
                    continue;
                }
                let whole = std::mem::take(&mut text);
                if !whole.trim().is_empty() {
                    let _ = editor.add_history_entry(whole.as_str());
                }
                match chat.take(&whole) {
                    Ok(Next::Go) => {}
                    Ok(Next::Leave) => break,
                    Err(error) => eprintln!("{error:#}"),
                }
            }
            Err(ReadlineError::Interrupted) => text.clear(),
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(history) = &history {
        // A history that cannot be kept is no reason to fail.
        let _ = history.parent().map(std::fs::create_dir_all);
        let _ = editor.save_history(history);
    }
    Ok(())
}

/// Every line (or lines joined by `\`) is a message; a failure ends the program.
fn from_pipe(chat: &mut Chat) -> anyhow::Result<()> {
    let mut text = String::new();
    for line in std::io::stdin().lock().lines() {
        if add(&mut text, &line?) {
            continue;
        }
        if chat.take(&std::mem::take(&mut text))? == Next::Leave {
            return Ok(());
        }
    }
    chat.take(&text)?;
    Ok(())
}

/// Adds a line; true if it says that another one follows.
fn add(text: &mut String, line: &str) -> bool {
    match line.strip_suffix('\\') {
        Some(line) => {
            text.push_str(line);
            text.push('\n');
            true
        }
        None => {
            text.push_str(line);
            false
        }
    }
}

fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let state = state.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")))?;
    Some(state.join("mica/chat_history"))
}

impl Chat<'_> {
    fn take(&mut self, text: &str) -> anyhow::Result<Next> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Next::Go);
        }
        let Some(command) = text.strip_prefix('/') else {
            self.answer(text)?;
            return Ok(Next::Go);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "help" => eprintln!("{HELP}"),
            "clear" => self.messages.clear(),
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_string());
                self.messages.clear();
            }
            "save" if rest.is_empty() => return Err(Usage("/save needs a file".to_string()).into()),
            "save" => self.save(rest)?,
            "exit" | "quit" => return Ok(Next::Leave),
            _ => return Err(Usage(format!("unknown command /{name}; /help lists them")).into()),
        }
        Ok(Next::Go)
    }

    fn conversation(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        system.chain(self.messages.iter().cloned()).collect()
    }

    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::new("user", text));
        match self.generate() {
            Ok(answer) => {
                self.messages.push(Message::new("assistant", answer));
                Ok(())
            }
            Err(error) => {
                // What could not be answered is not part of the conversation.
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn generate(&self) -> anyhow::Result<String> {
        let messages = self.conversation();
        let request = ChatRequest { add_generation_prompt: true, ..ChatRequest::new(&messages) };
        let prompt = self.template.encode(&request, &self.tokenizer)?.ids;
        let options = self.args.sampling.options(&self.loaded)?;
        let model = self.loaded.model.as_ref();
        let eos = self.tokenizer.eos_ids();
        let mut answer = String::new();
        let mut out = std::io::stdout().lock();
        self.stop.store(false, Ordering::Relaxed);
        for piece in Generator::new(model, Some(&self.tokenizer), eos, &prompt, options)? {
            if self.stop.swap(false, Ordering::Relaxed) {
                break;
            }
            let piece = piece?;
            answer.push_str(&piece.text);
            write!(out, "{}", piece.text)?;
            out.flush()?;
        }
        writeln!(out)?;
        Ok(answer)
    }

    fn save(&self, file: &str) -> anyhow::Result<()> {
        let document = serde_json::json!({"messages": self.conversation()});
        mica_io::atomic::write(file, format!("{document}\n"))?;
        eprintln!("saved to {file}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_end_with_a_backslash_go_on() {
        let mut text = String::new();
        assert!(add(&mut text, "one\\"));
        assert!(!add(&mut text, "two"));
        assert_eq!(text, "one\ntwo");
    }
}
