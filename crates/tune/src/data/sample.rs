//! Records become samples: tokens, and for each token whether it is to be learnt.
//!
//! The rules (each has been wrong in some well-known trainer):
//! - What is learnt is said by a mask of its own, never by comparing with the padding token: the end
//!   mark is learnt even where it doubles as padding.
//! - A conversation is tokenized in one go; its parts are found in the result. Tokens of pieces glued
//!   together differ from what the model sees later, because pairs merge across the border.
//! - The template's generation prompt (`<|im_start|>assistant\n`) belongs to the prompt.
//! - Of a plain pair, the completion starts at the first token in which the tokens of prompt +
//!   completion differ from those of the prompt alone, so a token that spans the border is learnt.
//! - What is longer than `max_length` loses its end, and every such row is counted.
//!
//! A sample's first token is never a target, since nothing precedes it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::encode::Encode;
use super::format::{Record, Turns};

/// A tokenized example.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sample {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// For each token, whether it is to be predicted from those before it.
    pub targets: Vec<bool>,
}

impl Sample {
    /// How many tokens are to be learnt.
    pub fn labelled(&self) -> usize {
        self.targets.iter().filter(|&&target| target).count()
    }

    /// How many positions the sample takes in a batch: its last token is only ever predicted.
    pub fn positions(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    fn new(tokens: Vec<u32>, target: impl Fn(usize) -> bool) -> Sample {
        let targets = (0..tokens.len()).map(|i| i > 0 && target(i)).collect();
        Sample { tokens, targets }
    }
}

/// Which tokens of a prompt-and-answer record are to be learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learn {
    /// Everything (`mica lora` without `mask_prompt`).
    All,
    /// What the template's generation marks enclose, or everything where it has none.
    Marked,
    /// The completion; of a conversation, every turn of the assistant.
    Assistant,
    /// The completion; of a conversation, the last turn of the assistant (`mica lora --mask-prompt`).
    LastAssistant,
}

/// How a pair of strings becomes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairs {
    /// As a user's and the assistant's message through the chat template (mlx-lm).
    Template,
    /// One after the other as they stand, then the end mark (trl).
    Plain,
}

/// What happens to rows with more tokens than fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// The end is cut off.
    Cut,
    /// Running text goes on in further samples; each begins with the last token of the one before, so
    /// that every token is predicted once. Other records are cut.
    Split,
}

/// How records become samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Learnt tokens of prompt + completion records.
    pub pairs_learn: Learn,
    /// Learnt tokens of conversations.
    pub chat_learn: Learn,
    /// How strings become a conversation or a text.
    pub pairs: Pairs,
    /// Most tokens of a sample.
    pub max_length: usize,
    /// What happens to longer ones.
    pub long_rows: LongRows,
}

impl Rules {
    /// `mica train`: plain pairs, completions only; conversations by the template's marks, or whole, unless
    /// `mask_prompt` asks for the assistant's turns.
    pub fn train(max_length: usize, mask_prompt: bool) -> Rules {
        let chat_learn = if mask_prompt { Learn::Assistant } else { Learn::Marked };
        Rules {
            pairs_learn: Learn::Assistant,
            chat_learn,
            pairs: Pairs::Plain,
            max_length,
            long_rows: LongRows::Cut,
        }
    }

    /// `mica lora`, with mlx-lm's meanings: everything is learnt, or only the final answer.
    pub fn lora(max_length: usize, mask_prompt: bool) -> Rules {
        let learn = if mask_prompt { Learn::LastAssistant } else { Learn::All };
        Rules {
            pairs_learn: learn,
            chat_learn: learn,
            pairs: Pairs::Template,
            max_length,
            long_rows: LongRows::Cut,
        }
    }

    /// Continued pretraining: every token, long texts split.
    pub fn pretrain(max_length: usize) -> Rules {
        Rules {
            pairs_learn: Learn::All,
            chat_learn: Learn::All,
            pairs: Pairs::Plain,
            max_length,
            long_rows: LongRows::Split,
        }
    }
}

/// Sums over the rows of a data set, for the report before a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Rows that were read, bad ones excluded.
    pub rows: usize,
    /// Samples they gave.
    pub samples: usize,
    /// Rows longer than `max_length`, of which tokens were cut off.
    pub cut_rows: usize,
    /// Tokens that were cut off.
    pub cut_tokens: usize,
    /// Rows that were split into several samples.
    pub split_rows: usize,
    /// Rows passed over because nothing in them is to be learnt (perhaps after the cut).
    pub unlabelled_rows: usize,
    /// Bad lines passed over.
    pub bad_lines: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Tokens to be learnt.
    pub labelled_tokens: usize,
    /// Tokens of the longest sample.
    pub longest: usize,
}

impl Totals {
    /// The warning to show about cut and useless rows, if there is one.
    pub fn warning(&self, max_length: usize) -> Option<String> {
        let mut parts = Vec::new();
        if self.cut_rows > 0 {
            parts.push(format!(
                "{} of {} rows are longer than {max_length} tokens and lose their end ({} tokens in all); \
                 raise --max-seq-length to keep them",
                self.cut_rows, self.rows, self.cut_tokens
            ));
        }
        if self.unlabelled_rows > 0 {
            parts.push(format!(
                "{} of {} rows have nothing to learn{} and are left out",
                self.unlabelled_rows,
                self.rows,
                if self.cut_rows > 0 { " within that length" } else { "" }
            ));
        }
        if self.bad_lines > 0 {
            parts.push(format!("{} bad lines were skipped", self.bad_lines));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Makes samples of records.
pub struct Sampler<'a> {
    encode: &'a dyn Encode,
    rules: Rules,
}

impl<'a> Sampler<'a> {
    /// A sampler with these rules over this tokenizer.
    pub fn new(encode: &'a dyn Encode, rules: Rules) -> Self {
        Sampler { encode, rules }
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The samples of a record (none if there is nothing to learn in it), counted into `totals`.
    /// Errors are one line of cause, for the caller to add the place.
    pub fn samples(&self, record: &Record, totals: &mut Totals) -> Result<Vec<Sample>, String> {
        let is_text = matches!(record, Record::Text(_));
        let whole = self.whole(record)?;
        self.known(&whole)?;
        totals.rows += 1;
        let length = whole.tokens.len();
        let limit = self.rules.max_length.max(2);
        let mut samples = if is_text && length > limit && self.rules.long_rows == LongRows::Split {
            totals.split_rows += 1;
            split(&whole, limit)
        } else {
            vec![self.cut(whole, totals)]
        };
        samples.retain(|sample| sample.labelled() > 0);
        totals.unlabelled_rows += usize::from(samples.is_empty());
        for sample in &samples {
            totals.samples += 1;
            totals.tokens += sample.tokens.len();
            totals.labelled_tokens += sample.labelled();
            totals.longest = totals.longest.max(sample.tokens.len());
        }
        Ok(samples)
    }

    /// The better and the worse answer of a preference record, each after the prompt, with the answers as
    /// targets. A prompt that the record doesn't have is what both answers begin with.
    pub fn preference(&self, record: &Record, totals: &mut Totals) -> Result<[Sample; 2], String> {
        let Record::Preference { prompt, chosen, rejected } = record else {
            return Err("expected \"chosen\" and \"rejected\"".into());
        };
        let (prompt, answers) = match prompt {
            Some(prompt) => (prompt.clone(), [chosen.clone(), rejected.clone()]),
            None => common_prompt(chosen, rejected)?,
        };
        totals.rows += 1;
        let [chosen, rejected] = answers.map(|answer| self.pair(&prompt, &answer, &[], Learn::Assistant));
        let before = totals.cut_rows;
        let (chosen, rejected) = (chosen?, rejected?);
        self.known(&chosen)?;
        self.known(&rejected)?;
        let samples = [self.cut(chosen, totals), self.cut(rejected, totals)];
        totals.cut_rows = before + usize::from(totals.cut_rows > before);
        totals.samples += 1;
        for sample in &samples {
            totals.tokens += sample.tokens.len();
            totals.labelled_tokens += sample.labelled();
            totals.longest = totals.longest.max(sample.tokens.len());
        }
        Ok(samples)
    }

    /// Fails on a token that the model has no row for: one that a record names, or one of a tokenizer that
    /// belongs to another model.
    fn known(&self, sample: &Sample) -> Result<(), String> {
        let vocabulary = self.encode.vocabulary();
        match sample.tokens.iter().find(|&&token| token >= vocabulary) {
            Some(token) => Err(format!(
                "token {token} is outside the model's {vocabulary} tokens; if the row is text, tokenizer.json belongs to \
                 another model, or config.json's vocab_size is wrong"
            )),
            None => Ok(()),
        }
    }

    /// A record at its full length.
    fn whole(&self, record: &Record) -> Result<Sample, String> {
        match record {
            Record::Messages { messages, tools } => self.conversation(messages, tools, self.rules.chat_learn, 0),
            Record::PromptCompletion { prompt, completion, tools } => {
                self.pair(prompt, completion, tools, self.rules.pairs_learn)
            }
            Record::Labelled { prompt, completion, .. } => self.pair(prompt, completion, &[], Learn::Assistant),
            Record::Text(text) => {
                let tokens = self.ended(self.encode.text(text)?);
                Ok(Sample::new(tokens, |_| true))
            }
            Record::TokenIds { tokens, targets } => {
                Ok(Sample::new(tokens.clone(), |i| targets.as_ref().is_none_or(|targets| targets[i])))
            }
            Record::Preference { .. } => {
                Err("\"chosen\"/\"rejected\" pairs need a preference method (dpo, orpo, …), not supervised training".into())
            }
            Record::Prompt { .. } => {
                Err("a \"prompt\" alone has nothing to learn; supervised training needs a \"completion\"".into())
            }
        }
    }

    /// A prompt and an answer, both strings or both messages.
    fn pair(
        &self,
        prompt: &Turns,
        completion: &Turns,
        tools: &[Value],
        learn: Learn,
    ) -> Result<Sample, String> {
        let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        match (prompt, completion) {
            (Turns::Text(prompt), Turns::Text(completion)) if self.rules.pairs == Pairs::Template => {
                let messages = [message("user", prompt), message("assistant", completion)];
                self.conversation(&messages, tools, learn, 1)
            }
            (Turns::Text(prompt), Turns::Text(completion)) => {
                let alone = self.encode.text(prompt)?;
                let tokens = self.ended(self.encode.text(&format!("{prompt}{completion}"))?);
                let border = tokens.iter().zip(&alone).take_while(|(a, b)| a == b).count();
                let all = matches!(learn, Learn::All | Learn::Marked);
                Ok(Sample::new(tokens, |i| all || i >= border))
            }
            (Turns::Messages(prompt), Turns::Messages(completion)) => {
                let messages: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
                self.conversation(&messages, tools, learn, prompt.len())
            }
            _ => Err("prompt and completion must both be strings or both be messages".into()),
        }
    }

    /// A conversation whose assistant turns count from message `from` on.
    fn conversation(
        &self,
        messages: &[Value],
        tools: &[Value],
        learn: Learn,
        from: usize,
    ) -> Result<Sample, String> {
        if !self.encode.has_template() {
            return Err(
                "the model has no chat template for conversations; give {\"text\"} or use a chat model"
                    .into(),
            );
        }
        let conversation = self.encode.conversation(messages, tools)?;
        let turns = match learn {
            Learn::All => return Ok(Sample::new(conversation.tokens, |_| true)),
            Learn::Marked if !conversation.marked => return Ok(Sample::new(conversation.tokens, |_| true)),
            Learn::LastAssistant if messages.last().is_some_and(|message| message["role"] == "assistant") => {
                conversation.last?
            }
            Learn::LastAssistant => conversation.assistant?.pop().into_iter().collect(),
            Learn::Marked | Learn::Assistant => {
                let mut turns = conversation.assistant?;
                let (prompt, completion) = messages.split_at(from.min(messages.len()));
                let said =
                    |part: &[Value]| part.iter().filter(|message| message["role"] == "assistant").count();
                if said(prompt) > 0 {
                    if turns.len() != said(prompt) + said(completion) {
                        return Err("the chat template joins turns of the assistant, so prompt and completion cannot be told apart".into());
                    }
                    turns.drain(..said(prompt));
                }
                turns
            }
        };
        Ok(Sample::new(conversation.tokens, |i| turns.iter().any(|turn| turn.contains(&i))))
    }

    /// With the end mark, unless it is already there.
    fn ended(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        if let Some(eos) = self.encode.eos()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        tokens
    }

    fn cut(&self, mut sample: Sample, totals: &mut Totals) -> Sample {
        let limit = self.rules.max_length.max(2);
        if sample.tokens.len() > limit {
            totals.cut_rows += 1;
            totals.cut_tokens += sample.tokens.len() - limit;
            sample.tokens.truncate(limit);
            sample.targets.truncate(limit);
        }
        sample
    }
}

/// Pieces of at most `limit` tokens, each beginning with the last token of the one before.
fn split(whole: &Sample, limit: usize) -> Vec<Sample> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start + 1 < whole.tokens.len() {
        let end = (start + limit).min(whole.tokens.len());
        let targets = &whole.targets;
        pieces.push(Sample::new(whole.tokens[start..end].to_vec(), |i| targets[start + i]));
        start = end - 1;
    }
    pieces
}

/// The prompt that two answers share: their common messages, or their common text.
fn common_prompt(chosen: &Turns, rejected: &Turns) -> Result<(Turns, [Turns; 2]), String> {
    match (chosen, rejected) {
        (Turns::Messages(a), Turns::Messages(b)) => {
            let shared = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            if shared == a.len() || shared == b.len() {
                return Err(
                    "\"chosen\" and \"rejected\" are the same conversation, or one begins the other".into()
                );
            }
            let rest = |list: &[Value]| Turns::Messages(list[shared..].to_vec());
            Ok((Turns::Messages(a[..shared].to_vec()), [rest(a), rest(b)]))
        }
        (Turns::Text(a), Turns::Text(b)) => {
            if a == b {
                return Err("\"chosen\" and \"rejected\" are the same text".into());
            }
            let mut shared = 0;
            for ((i, x), y) in a.char_indices().zip(b.chars()) {
                if x != y {
                    break;
                }
                shared = i + x.len_utf8();
            }
            // As trl: the space before the first different word belongs to the answers.
            if shared > 0 && a[..shared].ends_with(' ') {
                shared -= 1;
            }
            let rest = |text: &str| Turns::Text(text[shared..].to_string());
            Ok((Turns::Text(a[..shared].to_string()), [rest(a), rest(b)]))
        }
        _ => Err("\"chosen\" and \"rejected\" must both be strings or both be messages".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::{ByteEncoder, Conversation};
    use serde_json::json;

    fn text(t: &str) -> Turns {
        Turns::Text(t.into())
    }

    fn pair(prompt: &str, completion: &str) -> Record {
        Record::PromptCompletion { prompt: text(prompt), completion: text(completion), tools: vec![] }
    }

    fn chat(turns: &[(&str, &str)]) -> Record {
        let messages =
            turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        Record::Messages { messages, tools: vec![] }
    }

    /// The tokens as text ($ is the end mark) and below it a mark under each target.
    fn picture(sample: &Sample) -> (String, String) {
        let shown =
            sample.tokens.iter().map(|&id| if id == ByteEncoder::EOS { '$' } else { id as u8 as char });
        (shown.collect(), sample.targets.iter().map(|&target| if target { '^' } else { ' ' }).collect())
    }

    fn one(rules: Rules, record: &Record) -> (String, String) {
        let samples = Sampler::new(&ByteEncoder, rules).samples(record, &mut Totals::default()).unwrap();
        assert_eq!(samples.len(), 1);
        picture(&samples[0])
    }

    #[test]
    fn what_is_learnt() {
        let two_turns = chat(&[("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "ef")]);
        let from_messages = Record::PromptCompletion {
            prompt: Turns::Messages(vec![
                json!({"role": "assistant", "content": "x"}),
                json!({"role": "user", "content": "y"}),
            ]),
            completion: Turns::Messages(vec![json!({"role": "assistant", "content": "z"})]),
            tools: vec![],
        };
        let rows: &[(&str, Rules, &Record, &str, &str)] = &[
            (
                "text: all but the first, eos too",
                Rules::train(99, true),
                &Record::Text("abc".into()),
                "abc$",
                " ^^^",
            ),
            ("pair: the completion and eos", Rules::train(99, false), &pair("ab", "cd"), "abcd$", "  ^^^"),
            ("pair without a prompt", Rules::train(99, false), &pair("", "cd"), "cd$", " ^^"),
            (
                "lora: pair through the template, all learnt",
                Rules::lora(99, false),
                &pair("a", "b"),
                "<user:a><assistant:b>",
                " ^^^^^^^^^^^^^^^^^^^^",
            ),
            (
                "lora: generation prompt is not learnt, end of turn is",
                Rules::lora(99, true),
                &pair("a", "b"),
                "<user:a><assistant:b>",
                "                   ^^",
            ),
            (
                "lora: only the final answer",
                Rules::lora(99, true),
                &two_turns,
                "<user:a><assistant:bc><user:d><assistant:ef>",
                "                                         ^^^",
            ),
            (
                "train: every answer",
                Rules::train(99, true),
                &two_turns,
                "<user:a><assistant:bc><user:d><assistant:ef>",
                "                   ^^^                   ^^^",
            ),
            (
                "answers within the prompt are not learnt",
                Rules::train(99, false),
                &from_messages,
                "<assistant:x><user:y><assistant:z>",
                "                                ^^",
            ),
            (
                "token ids without labels",
                Rules::train(99, false),
                &Record::TokenIds { tokens: vec![97, 98], targets: None },
                "ab",
                " ^",
            ),
            (
                "token ids with labels",
                Rules::train(99, false),
                &Record::TokenIds { tokens: vec![97, 98, 99], targets: Some(vec![true, false, true]) },
                "abc",
                "  ^",
            ),
            ("pretraining learns prompts too", Rules::pretrain(99), &pair("ab", "cd"), "abcd$", " ^^^^"),
        ];
        for (name, rules, record, tokens, targets) in rows {
            assert_eq!(one(rules.clone(), record), (tokens.to_string(), targets.to_string()), "{name}");
        }
    }

    /// Tokenizes "bc" into one token, so that a border can fall inside a token.
    struct Merging;

    impl Encode for Merging {
        fn text(&self, text: &str) -> Result<Vec<u32>, String> {
            ByteEncoder.text(&text.replace("bc", "\u{1}"))
        }
        fn eos(&self) -> Option<u32> {
            Some(2)
        }
        fn conversation(&self, _: &[Value], _: &[Value]) -> Result<Conversation, String> {
            Err("no template".into())
        }
        fn has_template(&self) -> bool {
            false
        }
        fn vocabulary(&self) -> u32 {
            200
        }
    }

    /// A tokenizer that knows more than its model: the model's tokens end after "b".
    struct TooLarge;

    impl Encode for TooLarge {
        fn text(&self, text: &str) -> Result<Vec<u32>, String> {
            ByteEncoder.text(text)
        }
        fn eos(&self) -> Option<u32> {
            None
        }
        fn conversation(&self, messages: &[Value], tools: &[Value]) -> Result<Conversation, String> {
            ByteEncoder.conversation(messages, tools)
        }
        fn has_template(&self) -> bool {
            true
        }
        fn vocabulary(&self) -> u32 {
            99
        }
    }

    #[test]
    fn tokens_that_the_model_has_no_row_for_are_refused() {
        let preference = |rejected: &str| Record::Preference {
            prompt: Some(text("a")),
            chosen: text("b"),
            rejected: text(rejected),
        };
        let sampler = Sampler::new(&TooLarge, Rules::train(99, false));
        let totals = &mut Totals::default();
        assert_eq!(sampler.samples(&Record::Text("abba".into()), totals).unwrap().len(), 1);
        assert!(sampler.preference(&preference("bb"), totals).is_ok());
        for (name, error) in [
            ("text", sampler.samples(&Record::Text("abc".into()), totals).unwrap_err()),
            ("a pair", sampler.samples(&pair("c", "b"), totals).unwrap_err()),
            ("a chat", sampler.samples(&chat(&[("user", "a"), ("assistant", "b")]), totals).unwrap_err()),
            (
                "token ids",
                sampler
                    .samples(&Record::TokenIds { tokens: vec![97, 99], targets: None }, totals)
                    .unwrap_err(),
            ),
            ("a preference", sampler.preference(&preference("c"), totals).unwrap_err()),
        ] {
            assert!(error.contains("outside the model's 99 tokens"), "{name}: {error}");
        }
    }

    #[test]
    fn a_token_across_the_border_is_learnt() {
        let sampler = Sampler::new(&Merging, Rules::train(99, false));
        let samples = sampler.samples(&pair("ab", "cd"), &mut Totals::default()).unwrap();
        assert_eq!(samples[0].tokens, [97, 1, 100, 2]);
        assert_eq!(samples[0].targets, [false, true, true, true]);
    }

    #[test]
    fn a_text_that_ends_with_the_end_mark_gets_no_second_one() {
        let sampler = Sampler::new(&Merging, Rules::train(99, false));
        let samples = sampler.samples(&Record::Text("a\u{2}".into()), &mut Totals::default()).unwrap();
        assert_eq!(samples[0].tokens, [97, 2]);
    }

    #[test]
    fn cuts_and_useless_rows_are_counted() {
        let sampler = Sampler::new(&ByteEncoder, Rules::train(4, false));
        let mut totals = Totals::default();
        assert_eq!(picture(&sampler.samples(&pair("ab", "cdef"), &mut totals).unwrap()[0]).0, "abcd");
        assert!(sampler.samples(&pair("abcdef", "g"), &mut totals).unwrap().is_empty());
        assert_eq!(sampler.samples(&Record::Text("ab".into()), &mut totals).unwrap().len(), 1);
        let expected = Totals {
            rows: 3,
            samples: 2,
            cut_rows: 2,
            cut_tokens: 3 + 4,
            unlabelled_rows: 1,
            tokens: 7,
            labelled_tokens: 4,
            longest: 4,
            ..Totals::default()
        };
        assert_eq!(totals, expected);
        let warning = totals.warning(4).unwrap();
        assert!(
            warning.contains("2 of 3 rows are longer than 4") && warning.contains("1 of 3 rows have nothing"),
            "{warning}"
        );
        assert_eq!(Totals::default().warning(4), None);
    }

    #[test]
    fn split_texts_predict_every_token_once() {
        for (length, limit) in [(1, 2), (9, 4), (10, 4), (11, 4), (3, 2), (4, 4), (5, 4)] {
            let sampler = Sampler::new(&ByteEncoder, Rules::pretrain(limit));
            let content: String = (0..length).map(|i| (b'a' + i as u8) as char).collect();
            let mut totals = Totals::default();
            let samples = sampler.samples(&Record::Text(content.clone()), &mut totals).unwrap();
            let learnt: Vec<u32> = samples
                .iter()
                .flat_map(|s| {
                    s.tokens.iter().zip(&s.targets).filter(|(_, target)| **target).map(|(&id, _)| id)
                })
                .collect();
            let mut all: Vec<u32> = content.bytes().map(u32::from).collect();
            all.push(ByteEncoder::EOS);
            assert_eq!(learnt, all[1..], "{length} in pieces of {limit}");
            assert!(samples.iter().all(|s| s.tokens.len() <= limit));
            assert_eq!(totals.cut_rows, 0);
        }
    }

    #[test]
    fn preferences_find_their_prompt() {
        let sampler = Sampler::new(&ByteEncoder, Rules::train(99, false));
        let said = Record::Preference { prompt: Some(text("q ")), chosen: text("yes"), rejected: text("no") };
        let implied = Record::Preference { prompt: None, chosen: text("q yes"), rejected: text("q no") };
        let cases = [("said", said, "q yes$", "  ^^^^"), ("implied", implied, "q yes$", " ^^^^^")];
        for (name, record, tokens, targets) in cases {
            let [chosen, rejected] = sampler.preference(&record, &mut Totals::default()).unwrap();
            assert_eq!(picture(&chosen), (tokens.to_string(), targets.to_string()), "{name}");
            assert_eq!(picture(&rejected).0, "q no$", "{name}");
        }
        let turns = |answer: &str| {
            Turns::Messages(vec![
                json!({"role": "user", "content": "q"}),
                json!({"role": "assistant", "content": answer}),
            ])
        };
        let record = Record::Preference { prompt: None, chosen: turns("y"), rejected: turns("n") };
        let [chosen, rejected] = sampler.preference(&record, &mut Totals::default()).unwrap();
        assert_eq!(picture(&chosen), ("<user:q><assistant:y>".into(), "                   ^^".into()));
        assert_eq!(picture(&rejected).0, "<user:q><assistant:n>");
        let same = Record::Preference { prompt: None, chosen: turns("y"), rejected: turns("y") };
        assert!(sampler.preference(&same, &mut Totals::default()).is_err());
    }

    #[test]
    fn records_that_cannot_be_used_say_why() {
        let cases = [
            (
                "preference",
                Record::Preference { prompt: None, chosen: text("a"), rejected: text("b") },
                "preference method",
            ),
            ("prompt", Record::Prompt { prompt: text("a"), extra: Default::default() }, "\"completion\""),
            ("id", Record::TokenIds { tokens: vec![1, 999], targets: None }, "999"),
            ("no template", chat(&[("user", "a")]), "no chat template"),
        ];
        for (name, record, part) in cases {
            let sampler = Sampler::new(&Merging, Rules::train(9, false));
            let error = sampler.samples(&record, &mut Totals::default()).expect_err(name);
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}
