//! Rewriting `{% generation %}` blocks, which the template engine does not know, into ones that it does.
//!
//! `{% generation %}…{% endgeneration %}` becomes a scope (`with`) whose output is enclosed in two variables; the
//! caller gives them sentinel characters as values and finds them in the output. Whitespace control (`-`, `+`) at
//! the outer edges keeps its meaning.

/// The variable printed where a block begins.
pub(super) const BEGIN: &str = "mica_generation_begin";
/// The variable printed where it ends.
pub(super) const END: &str = "mica_generation_end";

/// The rewritten source, or `None` if it has no such blocks.
pub(super) fn mark_generation(source: &str) -> Option<String> {
    let mut out = String::with_capacity(source.len() + 256);
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("{#") {
            rest.find("#}").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("{{") {
            inside(rest, "}}")
        } else if rest.starts_with("{%") {
            let length = inside(rest, "%}");
            let tag = &rest[..length];
            match tag_name(tag) {
                "generation" => {
                    found = true;
                    let (left, right) = edges(tag);
                    out.push_str(&format!("{{%{left} with %}}{{{{ {BEGIN} }}}}{{% if true {right}%}}"));
                    rest = &rest[length..];
                    continue;
                }
                "endgeneration" => {
                    let (left, right) = edges(tag);
                    out.push_str(&format!("{{%{left} endif %}}{{{{ {END} }}}}{{% endwith {right}%}}"));
                    rest = &rest[length..];
                    continue;
                }
                "raw" => raw_end(rest, length),
                _ => length,
            }
        } else {
            1
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    found.then_some(out)
}

/// The length of a tag up to and including `close`, which does not count inside of quotes.
fn inside(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut i = 2;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[i..].starts_with(close.as_bytes()) => return i + close.len(),
            _ => {}
        }
        i += 1;
    }
    bytes.len()
}

/// The first word of a tag.
fn tag_name(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    inner.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// The whitespace control at both ends of a tag.
fn edges(tag: &str) -> (&str, &str) {
    let control = |c: Option<char>| if matches!(c, Some('-' | '+')) { 1 } else { 0 };
    let left = control(tag[2..].chars().next());
    let inner = tag.strip_suffix("%}").unwrap_or(tag);
    let right = control(inner[2 + left..].chars().next_back());
    (&tag[2..2 + left], &inner[inner.len() - right..])
}

/// The length of `{% raw %}…{% endraw %}`.
fn raw_end(text: &str, open: usize) -> usize {
    let mut at = open;
    while let Some(next) = text[at..].find("{%") {
        let start = at + next;
        let length = text[start..].find("%}").map_or(text.len() - start, |end| end + 2);
        if tag_name(&text[start..start + length]) == "endraw" {
            return start + length;
        }
        at = start + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_where_they_are_tags() {
        for (source, marked) in [
            ("{% generation %}a{% endgeneration %}", true),
            ("{%- generation -%}a{%- endgeneration -%}", true),
            ("{%generation%}a{%endgeneration%}", true),
            ("{# {% generation %} #}", false),
            ("{{ '{% generation %}' }}", false),
            ("{% raw %}{% generation %}{% endraw %}", false),
            ("{% set generation = 1 %}", false),
            ("{% generations %}", false),
            ("{ {% if x == \"%}\" %} {", false),
            ("{% 'é", false),
            ("{%", false),
            ("{", false),
        ] {
            assert_eq!(mark_generation(source).is_some(), marked, "{source}");
        }
    }

    #[test]
    fn edges_are_kept() {
        assert_eq!(
            mark_generation("a {%- generation +%} b {% endgeneration -%} c").unwrap(),
            format!(
                "a {{%- with %}}{{{{ {BEGIN} }}}}{{% if true +%}} b {{% endif %}}{{{{ {END} }}}}{{% endwith -%}} c"
            )
        );
    }
}
