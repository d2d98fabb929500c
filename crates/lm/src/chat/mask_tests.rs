//! Which tokens are learnt, told through the text that they stand for.

use super::*;
use crate::tokenizer::tests::byte_level;
use serde_json::{Map, json};

const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// Opens a thought in the prompt that finished turns do not have.
const OPENS_THOUGHT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
/// As Qwen 3: only the last turn shows its reasoning, and an empty one if it has none.
const DROPS_THOUGHTS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}\
    {{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const MARKS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\
    {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\
    {% endfor %}";
/// No end-of-sequence token anywhere.
const NO_END: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %} (end){% endif %}\n{% endfor %}";

fn tokenize(source: &str, messages: serde_json::Value) -> (Tokenizer, MaskedConversation) {
    let tokenizer = byte_level();
    let template = ChatTemplate::new("test", source, Map::new()).unwrap();
    let conversation = Conversation::from_json(&json!({"messages": messages})).unwrap();
    let masked = tokenize_conversation(&template, &tokenizer, &conversation, &Map::new()).unwrap();
    (tokenizer, masked)
}

/// The learnt texts, each run of tokens one.
fn learnt(tokenizer: &Tokenizer, ids: &[u32], mask: &[bool]) -> Vec<String> {
    assert_eq!(ids.len(), mask.len());
    let mut runs: Vec<Vec<u32>> = Vec::new();
    let mut inside = false;
    for (&id, &learn) in ids.iter().zip(mask) {
        if learn {
            if !inside {
                runs.push(Vec::new());
            }
            runs.last_mut().unwrap().push(id);
        }
        inside = learn;
    }
    runs.iter().map(|run| tokenizer.decode(run, false).unwrap()).collect()
}

#[test]
fn masks_of_every_kind_of_template() {
    let talk = json!([
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " first ", "reasoning_content": "hm"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "second<think>", "reasoning_content": "so"},
    ]);
    for (name, source, assistant, last) in [
        (
            "plain",
            PLAIN,
            &[" first <|im_end|>\n", "second<think><|im_end|>\n"][..],
            "second<think><|im_end|>\n",
        ),
        (
            "opens a thought",
            OPENS_THOUGHT,
            &[" first <|im_end|>\n", "second<think><|im_end|>\n"],
            "second<think><|im_end|>\n",
        ),
        (
            "drops thoughts",
            DROPS_THOUGHTS,
            &["first<|im_end|>", "<think>so</think>second<think><|im_end|>\n"],
            "<think>so</think>second<think><|im_end|>\n",
        ),
        ("marks", MARKS, &[" first <|im_end|>", "second<think><|im_end|>"], "second<think><|im_end|>\n"),
    ] {
        let (t, masked) = tokenize(source, talk.clone());
        assert_eq!(learnt(&t, &masked.ids, &masked.assistant.unwrap()), assistant, "{name}");
        if name != "marks" {
            // Without a generation prompt in the template there is no telling the header from the answer.
            assert_eq!(learnt(&t, &masked.ids, &masked.last.unwrap()), [last], "{name}");
        }
    }
}

#[test]
fn what_cannot_be_told_says_why() {
    let (_, masked) =
        tokenize(NO_END, json!([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]));
    let why = masked.assistant.unwrap_err();
    assert!(why.contains("message 0") && why.contains("end-of-sequence"), "{why}");
}

#[test]
fn the_conversation_is_tokenized_as_a_whole() {
    // "hel" ends the prompt and "lo" begins the answer: one token, which belongs to the answer only in part.
    let source =
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}";
    let (t, masked) =
        tokenize(source, json!([{"role": "user", "content": "hel"}, {"role": "assistant", "content": "lo"}]));
    assert_eq!(masked.ids, [t.id("hello").unwrap()]);
    // The prompt's tokens are no beginning of the whole's; the token that holds the border counts as learnt.
    assert_eq!(masked.last, Ok(vec![true]));
}

#[test]
fn no_assistant_and_a_final_user() {
    let (t, masked) =
        tokenize(PLAIN, json!([{"role": "user", "content": "hello"}, {"role": "user", "content": "x"}]));
    assert_eq!(learnt(&t, &masked.ids, &masked.assistant.unwrap()), [""; 0]);
    assert_eq!(learnt(&t, &masked.ids, &masked.last.unwrap()), ["<|im_start|>user\nx<|im_end|>\n"]);
    let (_, masked) = tokenize(PLAIN, json!([]));
    assert!(masked.last.is_err());
}
