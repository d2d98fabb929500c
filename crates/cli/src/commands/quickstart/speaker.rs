//! Puts questions to the model of the quickstart, and makes samples of them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_lm::chat::{ChatRequest, ChatTemplate, Message};
use mica_lm::generate::{Generator, Options};
use mica_lm::load::Loaded;
use mica_lm::tokenizer::{Specials, Tokenizer};
use mica_tune::data::chat::ModelEncoder;
use mica_tune::data::format::{Columns, Form};
use mica_tune::data::sample::{Rules, Sampler, Totals};
use mica_tune::data::samples::InMemory;
use mica_tune::quickstart::questions::Question;
use mica_tune::quickstart::world::Fact;
use serde_json::Value;

use crate::exit::Stopped;

/// Longest reply, in tokens; the longest right answer has about half.
const REPLY: usize = 40;
/// Tokens of a completion: the longest value has three.
const COMPLETION: usize = 4;

/// A model's tokenizer and chat template.
pub struct Speaker<'a> {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// Ends the asking, when set.
    stop: &'a AtomicBool,
}

impl Speaker<'_> {
    /// Of the model in a folder.
    pub fn new<'a>(folder: &Path, stop: &'a AtomicBool) -> anyhow::Result<Speaker<'a>> {
        let template = ChatTemplate::load(folder)?;
        let template = template.ok_or_else(|| anyhow::anyhow!("the base model has no chat template"))?;
        Ok(Speaker { tokenizer: Tokenizer::load(folder)?, template, stop })
    }

    /// Greedy answers.
    pub fn ask(&self, loaded: &Loaded, questions: &[Question]) -> anyhow::Result<Vec<String>> {
        questions.iter().map(|question| self.answer(loaded, question)).collect()
    }

    /// For each question whether the model knows the fact that is asked for: whether it goes on with the
    /// right value where a plain sentence stops.
    pub fn knows(&self, loaded: &Loaded, questions: &[Question]) -> anyhow::Result<Vec<bool>> {
        questions.iter().map(|question| self.completes(loaded, &question.fact)).collect()
    }

    fn completes(&self, loaded: &Loaded, fact: &Fact) -> anyhow::Result<bool> {
        let prompt = self.tokenizer.encode(&fact.unfinished(), Specials::None)?;
        let text = self.generate(loaded, &prompt, COMPLETION)?;
        Ok(text.trim_start().starts_with(&format!("{}.", fact.value())))
    }

    fn answer(&self, loaded: &Loaded, question: &Question) -> anyhow::Result<String> {
        let messages =
            question.messages().into_iter().map(Message::from_json).collect::<Result<Vec<_>, _>>()?;
        let request = ChatRequest { add_generation_prompt: true, ..ChatRequest::new(&messages) };
        let prompt = self.template.encode(&request, &self.tokenizer)?.ids;
        self.generate(loaded, &prompt, REPLY)
    }

    fn generate(&self, loaded: &Loaded, prompt: &[u32], max_tokens: usize) -> anyhow::Result<String> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Stopped("stopped; start mica quickstart again".to_string()).into());
        }
        let options = Options { max_tokens, ..Options::for_model(loaded) };
        let eos = self.tokenizer.eos_ids();
        let mut text = String::new();
        for piece in Generator::new(loaded.model.as_ref(), Some(&self.tokenizer), eos, prompt, options)? {
            text.push_str(&piece?.text);
        }
        Ok(text)
    }

    /// The questions with their answers as samples of which the answer is learnt. `name` is written into
    /// the run's checkpoints, so that another run does not go on with them.
    pub fn samples(
        &self,
        loaded: &Loaded,
        questions: &[Question],
        length: usize,
        name: &str,
    ) -> anyhow::Result<InMemory> {
        let vocabulary = loaded.model.info().vocabulary;
        let encoder = ModelEncoder::new(self.tokenizer.clone(), Some(self.template.clone()), vocabulary);
        let sampler = Sampler::new(&encoder, Rules::train(length, true));
        let (mut samples, mut totals) = (Vec::new(), Totals::default());
        for question in questions {
            let Value::Object(line) = question.line() else { unreachable!("a question's line is an object") };
            let record = Form::Messages.parse(line, &Columns::default()).map_err(anyhow::Error::msg)?;
            samples.extend(sampler.samples(&record, &mut totals).map_err(anyhow::Error::msg)?);
        }
        Ok(InMemory::from_samples(&samples, name))
    }
}
