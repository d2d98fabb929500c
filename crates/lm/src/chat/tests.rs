//! Templates against `transformers` (fixtures/chat, made by fixtures/make/make_chat.py), folders, and bounds.
//! Guarding and masks have their tests in `chat/guard_tests.rs` and `chat/mask_tests.rs`.

use super::*;
use crate::ErrorKind;
use serde_json::json;

fn fixture(name: &str) -> Value {
    let path = mica_testkit::fixture(format!("chat/{name}"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn named_tokens() -> Map<String, Value> {
    let Value::Object(tokens) =
        json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
    else {
        unreachable!("an object")
    };
    tokens
}

fn render_case(template: &ChatTemplate, case: &Value) -> Result<Rendered> {
    let mut extra = case.as_object().unwrap().clone();
    let messages: Vec<Message> = extra
        .remove("messages")
        .map(|list| {
            list.as_array().unwrap().iter().map(|m| Message(m.as_object().unwrap().clone())).collect()
        })
        .unwrap();
    let tools = extra.remove("tools").map(|tools| tools.as_array().unwrap().clone());
    let request = ChatRequest {
        tools: tools.as_deref(),
        add_generation_prompt: extra.remove("add_generation_prompt").is_some_and(|add| add == true),
        extra,
        guard: Guard::Off,
        now: Some(Moment { year: 2025, month: 3, day: 4, hour: 15, minute: 6, second: 7 }),
        ..ChatRequest::new(&messages)
    };
    template.render_with(&request, None)
}

#[test]
fn own_templates_render_as_transformers_does() {
    let (cases, own) = (fixture("cases.json"), fixture("own.json"));
    let mut rendered = 0;
    for (name, expected) in own["templates"].as_object().unwrap() {
        let source =
            std::fs::read_to_string(mica_testkit::fixture(format!("chat/templates/{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(name, &source, named_tokens()).unwrap();
        for (case, input) in cases["cases"].as_object().unwrap() {
            let got = render_case(&template, input);
            let Some(text) = expected[case]["text"].as_str() else {
                assert!(got.is_err(), "{name}, {case}: expected an error, got {got:?}");
                continue;
            };
            let got = got.unwrap_or_else(|e| panic!("{name}, {case}: {e}"));
            assert_eq!(got.text, text, "{name}, {case}");
            rendered += 1;
            let chars = |at: usize| got.text[..at].chars().count();
            let marked: Vec<_> =
                got.generated.iter().map(|g| json!([chars(g.start), chars(g.end)])).collect();
            // transformers counts wrongly for blocks inside of macros, so those are tested below.
            if name != "generation_in_macro" {
                assert_eq!(Value::from(marked), expected[case]["generated"], "{name}, {case}");
            }
        }
    }
    assert!(rendered > 60, "{rendered}");
}

#[test]
fn generation_blocks_inside_of_macros_are_found() {
    let source =
        std::fs::read_to_string(mica_testkit::fixture("chat/templates/generation_in_macro.jinja")).unwrap();
    let template = ChatTemplate::new("macro", &source, Map::new()).unwrap();
    assert!(template.marks_generation(false));
    let cases = fixture("cases.json");
    let got = render_case(&template, &cases["cases"]["multi_nosys"]).unwrap();
    let marked: Vec<&str> = got.generated.iter().map(|g| &got.text[g.clone()]).collect();
    assert_eq!(marked, ["I am fine.<|im_end|>\n", "Later.<|im_end|>\n"]);
}

/// FNV-1a over the bytes, as the script has it.
fn fnv(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn real_templates_render_as_transformers_does() {
    // The engine (minijinja 3.0.5) panics on `[][::-1]`, which becomes an error.
    const KNOWN: [(&str, &str); 1] = [("Reka-Edge", "empty")];
    let Some(folder) = mica_testkit::shared("data/chat_templates") else { return };
    let (cases, expected) = (fixture("cases.json"), fixture("shared.json"));
    let (mut same, mut templates) = (0, 0);
    let mut wrong = Vec::new();
    for (name, expected) in expected["templates"].as_object().unwrap() {
        let Ok(source) = std::fs::read_to_string(folder.join(format!("{name}.jinja"))) else {
            eprintln!("skipped: {name} is not there");
            continue;
        };
        templates += 1;
        let template = ChatTemplate::new(name, &source, named_tokens()).unwrap();
        for (case, input) in cases["cases"].as_object().unwrap() {
            let hash = expected[case].as_str().unwrap();
            let got = render_case(&template, input);
            if hash.ends_with("Error") {
                // Where Python fails we may be more lenient, but a refusal must be one.
                if hash == "TemplateError" {
                    assert!(
                        matches!(got, Err(Error::Template { refused: true, .. })),
                        "{name}, {case}: {got:?}"
                    );
                }
                continue;
            }
            match got {
                Ok(got) if fnv(&got.text) == hash => same += 1,
                _ if KNOWN.contains(&(name, case)) => {}
                Ok(got) => wrong.push(format!("{name}, {case}: {}", got.text)),
                Err(e) => wrong.push(format!("{name}, {case}: {e}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {}", wrong.len(), same + wrong.len(), wrong.join("\n"));
    eprintln!("{same} renderings of {templates} templates are equal");
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

#[test]
fn every_place_of_a_template() {
    let hello = [Message::new("user", "hi")];
    let tools = [json!({"type": "function"})];
    for (name, files, plain, with_tools) in [
        ("none", vec![], None, None),
        ("null", vec![("tokenizer_config.json", r#"{"chat_template": null}"#)], None, None),
        (
            "string",
            vec![(
                "tokenizer_config.json",
                r#"{"chat_template": "C{{ bos_token }}", "bos_token": {"content": "<b>"}}"#,
            )],
            Some("C<b>"),
            Some("C<b>"),
        ),
        (
            "token of the map",
            vec![
                (
                    "tokenizer_config.json",
                    r#"{"chat_template": "{{ eos_token }}{{ bos_token }}", "bos_token": null}"#,
                ),
                ("special_tokens_map.json", r#"{"eos_token": "<e>"}"#),
            ],
            Some("<e>"),
            Some("<e>"),
        ),
        (
            "list",
            vec![(
                "tokenizer_config.json",
                r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}"#,
            )],
            Some("D"),
            Some("T"),
        ),
        (
            "jinja before the config",
            vec![("chat_template.jinja", "J"), ("tokenizer_config.json", r#"{"chat_template": "C"}"#)],
            Some("J"),
            Some("J"),
        ),
        (
            "additional",
            vec![("chat_template.jinja", "J"), ("additional_chat_templates/tool_use.jinja", "T")],
            Some("J"),
            Some("T"),
        ),
        ("json", vec![("chat_template.json", r#"{"chat_template": "S"}"#)], Some("S"), Some("S")),
    ] {
        let dir = folder(&files);
        let template = ChatTemplate::load(dir.path()).unwrap();
        for (tools, expected) in [(None, plain), (Some(&tools[..]), with_tools)] {
            let request = ChatRequest { tools, ..ChatRequest::new(&hello) };
            let got = template.as_ref().map(|t| t.render(&request).unwrap());
            assert_eq!(got.as_deref(), expected, "{name}");
        }
    }
    let named =
        r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]}"#;
    let template = ChatTemplate::load(folder(&[("tokenizer_config.json", named)]).path()).unwrap().unwrap();
    let rag = template.with_default("rag").unwrap();
    assert_eq!(rag.render(&ChatRequest::new(&hello)).unwrap(), "R");
    assert_eq!(template.with_default("x").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn broken_templates_say_what_is_wrong() {
    for (name, files, words) in [
        ("syntax", vec![("chat_template.jinja", "a\n{% if %}")], "line 2"),
        ("type", vec![("tokenizer_config.json", r#"{"chat_template": 3}"#)], "the number 3"),
        (
            "entry",
            vec![("tokenizer_config.json", r#"{"chat_template": [{"name": "x"}]}"#)],
            "`name` and `template`",
        ),
        ("empty list", vec![("chat_template.json", r#"{"chat_template": 1}"#)], "chat_template"),
    ] {
        let dir = folder(&files);
        let error = ChatTemplate::load(dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData, "{name}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    let hello = [Message::new("user", "hi")];
    for (name, source, words, refuses) in [
        ("refusal", "{{ raise_exception('only ' ~ messages|length) }}", "only 1", true),
        (
            "refusal in a macro",
            "{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}",
            "no",
            true,
        ),
        ("method", "a\n{{ 'x'.nope() }}", "line 2", false),
        ("undefined", "{{ a.b.c }}", "undefined", false),
        ("time", "{{ strftime_now('%Q') }}", "unknown format", false),
        ("file", "{% include '/etc/passwd' %}", "passwd", false),
    ] {
        let template = ChatTemplate::new(name, source, Map::new()).unwrap();
        match template.render(&ChatRequest::new(&hello)).unwrap_err() {
            Error::Template { message, refused, .. } => {
                assert!(message.contains(words), "{name}: {message}");
                assert_eq!(refused, refuses, "{name}");
            }
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn a_template_is_bounded() {
    let hello = [Message::new("user", "hi")];
    for (name, source, words) in [
        (
            "steps",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% set x = a %}{% endfor %}{% endfor %}{% endfor %}",
            "too many steps",
        ),
        ("recursion", "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
        ("output", "{% for i in range(9999) %}{{ 'x' * 1000000 }}{% endfor %}", "longer than 64 MiB"),
        ("repetition", "{{ 'x' * 1000000000000 }}", ""),
        ("range", "{{ range(1000000000)|list|length }}", ""),
        ("replace", "{{ 'a'.replace('a', 'b' * 1000000).replace('b', 'c' * 100000) }}", "more than 64 MiB"),
        ("replace filter", "{{ ('b' * 1000000)|replace('b', 'c' * 100000) }}", "more than 64 MiB"),
        ("replace of nothing", "{{ ('b' * 1000000)|replace('', 'c' * 100000) }}", "more than 64 MiB"),
        ("a printed list", "{{ [1] * 9999999 }}", "more than 64 MiB"),
        ("a printed list of lists", "{{ [[1] * 9999] * 9999 }}", "more than 64 MiB"),
        ("a list of a list", "{{ ([1] * 99999999)|list|length }}", "more than 64 MiB"),
        ("a sorted list", "{{ ([1] * 99999999)|sort|length }}", "more than 64 MiB"),
        ("a joined list", "{{ ([1] * 99999999)|join }}", "more than 64 MiB"),
        ("joined with much", "{{ range(9999)|join('x' * 99999) }}", "more than 64 MiB"),
        ("the method join", "{{ ('x' * 99999).join(range(9999)|map('string')|list) }}", "more than 64 MiB"),
        ("json", "{{ ([['x' * 999] * 9999] * 9999)|tojson }}", "more than 64 MiB"),
        ("indentation", "{{ ('\n' * 99999)|indent(99999) }}", "more than 64 MiB"),
        (
            "much in all",
            "{% for i in range(999) %}{% set x = 'b'.replace('b', 'c' * 9000000) %}{% endfor %}",
            "more than 1024 MiB",
        ),
        (
            "doubling",
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "more than 64 MiB",
        ),
        (
            "doubling with plus",
            "{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m('ab') }}",
            "more than 64 MiB",
        ),
        (
            "doubling a list",
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "more than 64 MiB",
        ),
        (
            "nested json",
            "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
            "200 deep",
        ),
    ] {
        let template = ChatTemplate::new(name, source, Map::new()).unwrap();
        let error = template.render(&ChatRequest::new(&hello)).unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
    assert!(ChatTemplate::new("parentheses", &deep, Map::new()).is_err());
    let deep = "{% if 1 %}".repeat(20_000) + &"{% endif %}".repeat(20_000);
    assert!(ChatTemplate::new("blocks", &deep, Map::new()).is_err());
    let mut nested = json!("x");
    for _ in 0..1000 {
        nested = json!([nested]);
    }
    let messages = [Message::from_json(json!({"role": "user", "content": nested})).unwrap()];
    let template = ChatTemplate::new("plain", "{{ messages }}", Map::new()).unwrap();
    assert_eq!(template.render(&ChatRequest::new(&messages)).unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn the_present_is_told_when_no_time_is_given() {
    let template = ChatTemplate::new("now", "{{ strftime_now('%Y') }}", Map::new()).unwrap();
    let year: i32 = template.render(&ChatRequest::new(&[])).unwrap().parse().unwrap();
    assert!((2025..2200).contains(&year), "{year}");
}

#[test]
fn a_final_message_is_continued() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    let trims = source.replace("m.content", "m.content | trim");
    for (name, source, content, expected) in [
        ("as it is", source, "It is ", "<user>hi</s><assistant>It is "),
        ("trimmed", &trims, " It is ", "<user>hi</s><assistant>It is"),
        ("the last of two", source, "hi", "<user>hi</s><assistant>hi"),
        ("empty", source, "", "<user>hi</s><assistant></s>"),
    ] {
        let messages = [Message::new("user", "hi"), Message::new("assistant", content)];
        let template = ChatTemplate::new(name, source, Map::new()).unwrap();
        let request = ChatRequest { continue_final_message: true, ..ChatRequest::new(&messages) };
        assert_eq!(template.render(&request).unwrap(), expected, "{name}");
        let both = ChatRequest { add_generation_prompt: true, ..request };
        assert_eq!(template.render(&both).unwrap_err().kind(), ErrorKind::Usage, "{name}");
    }
    let messages = [Message::new("assistant", "abc")];
    let template = ChatTemplate::new("upper", "{{ messages[0].content | upper }}", Map::new()).unwrap();
    let request = ChatRequest { continue_final_message: true, ..ChatRequest::new(&messages) };
    assert!(template.render(&request).is_err());
}
