//! The real [`Encode`]: a model's tokenizer and chat template.

use std::ops::Range;
use std::path::Path;

use mica_lm::chat::{self, ChatTemplate, Message};
use mica_lm::tokenizer::{Specials, Tokenizer};
use serde_json::{Map, Value};

use super::encode::{Conversation, Encode};
use crate::Result;

/// Tokenizer and chat template of a model folder.
#[derive(Clone, Debug)]
pub struct ModelEncoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    vocabulary: u32,
    extra: Map<String, Value>,
}

impl ModelEncoder {
    /// The encoder of a model folder. `vocabulary` is the model's number of tokens, which may be larger than
    /// the tokenizer's.
    pub fn load(folder: impl AsRef<Path>, vocabulary: usize) -> Result<ModelEncoder> {
        let tokenizer = Tokenizer::load(&folder)?;
        let template = ChatTemplate::load(&folder)?;
        Ok(ModelEncoder::new(tokenizer, template, vocabulary))
    }

    /// The encoder of a tokenizer and a template that are loaded already.
    pub fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>, vocabulary: usize) -> ModelEncoder {
        let vocabulary = u32::try_from(vocabulary).unwrap_or(u32::MAX);
        ModelEncoder { tokenizer, template, vocabulary, extra: Map::new() }
    }

    /// With further variables for the template (`enable_thinking` …).
    pub fn with_extra(mut self, extra: Map<String, Value>) -> ModelEncoder {
        self.extra = extra;
        self
    }
}

impl Encode for ModelEncoder {
    fn text(&self, text: &str) -> std::result::Result<Vec<u32>, String> {
        self.tokenizer.encode(text, Specials::ParseAndAdd).map_err(|e| e.to_string())
    }

    fn eos(&self) -> Option<u32> {
        self.tokenizer.eos_id()
    }

    fn conversation(&self, messages: &[Value], tools: &[Value]) -> std::result::Result<Conversation, String> {
        let template = self.template.as_ref().ok_or("the model has no chat template")?;
        let messages: Vec<Message> = messages
            .iter()
            .enumerate()
            .map(|(i, message)| Message::from_json(message.clone()).map_err(|e| format!("message {i}: {e}")))
            .collect::<std::result::Result<_, _>>()?;
        let tools = (!tools.is_empty()).then(|| tools.to_vec());
        let marked = template.marks_generation(tools.is_some());
        let conversation = chat::Conversation { messages, tools };
        let masked = chat::tokenize_conversation(template, &self.tokenizer, &conversation, &self.extra)
            .map_err(|e| e.to_string())?;
        Ok(Conversation {
            assistant: masked.assistant.map(|mask| runs(&mask)),
            last: masked.last.map(|mask| runs(&mask)),
            tokens: masked.ids,
            marked,
        })
    }

    fn has_template(&self) -> bool {
        self.template.is_some()
    }

    fn vocabulary(&self) -> u32 {
        self.vocabulary
    }
}

/// Where a mask is true, as ranges.
fn runs(mask: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, _) in mask.iter().enumerate().filter(|(_, target)| **target) {
        match runs.last_mut() {
            Some(run) if run.end == i => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sample::{Rules, Sample, Sampler, Totals};
    use crate::quickstart::questions::{Part, Question};
    use crate::quickstart::tokenizer as words;

    /// The quickstart's own tokenizer and template, as a folder.
    fn encoder(template: &str) -> (ModelEncoder, Tokenizer) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), words::train(1, 200, 600).unwrap()).unwrap();
        let mut config: Value = serde_json::from_str(&words::config(512)).unwrap();
        config["chat_template"] = template.into();
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        (ModelEncoder::load(folder.path(), 600).unwrap(), Tokenizer::load(folder.path()).unwrap())
    }

    fn learnt(tokenizer: &Tokenizer, sample: &Sample) -> String {
        let ids: Vec<u32> = sample
            .tokens
            .iter()
            .zip(&sample.targets)
            .filter(|(_, target)| **target)
            .map(|(&id, _)| id)
            .collect();
        tokenizer.decode(&ids, false).unwrap()
    }

    #[test]
    fn the_answer_and_its_end_mark_are_learnt() {
        let plain = words::CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "");
        let [question] = &Question::some(1, Part::Train, 1)[..] else { panic!("one question") };
        let Value::Object(line) = question.line() else { panic!("an object") };
        let columns = crate::data::format::Columns::default();
        let record = crate::data::format::Form::Messages.parse(line, &columns).unwrap();
        let answer = format!("{}<|im_end|>", question.answer);
        let cases = [
            ("marks", words::CHAT_TEMPLATE, Rules::train(512, false), answer.clone()),
            ("marks, masked", words::CHAT_TEMPLATE, Rules::train(512, true), answer.clone()),
            ("no marks, masked", plain.as_str(), Rules::train(512, true), answer),
        ];
        for (name, template, rules, expected) in cases {
            let (encoder, tokenizer) = encoder(template);
            let samples = Sampler::new(&encoder, rules).samples(&record, &mut Totals::default()).unwrap();
            assert_eq!(learnt(&tokenizer, &samples[0]).trim_end(), expected, "{name}");
        }
        let (encoder, tokenizer) = encoder(&plain);
        for (mask, rules) in [(true, Rules::lora(512, true)), (false, Rules::lora(512, false))] {
            let samples = Sampler::new(&encoder, rules).samples(&record, &mut Totals::default()).unwrap();
            let text = learnt(&tokenizer, &samples[0]);
            assert!(text.contains(&question.answer), "{text}");
            assert_eq!(text.contains(&question.prompt), !mask, "{text}");
        }
    }

    #[test]
    fn masks_become_runs() {
        assert_eq!(runs(&[false, true, true, false, true]), [1..3, 4..5]);
        assert!(runs(&[]).is_empty());
    }
}
