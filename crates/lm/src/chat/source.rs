//! Rewriting what the template engine does not know into what it does.
//!
//! `{% generation %}…{% endgeneration %}` becomes a scope (`with`) whose output is enclosed in two variables; the
//! caller gives them sentinel characters as values and finds them in the output. Whitespace control (`-`, `+`) at
//! the outer edges keeps its meaning.
//!
//! `'%s-%d' % (a, b)`, Python's formatting of a literal string, becomes a filter: `'%s-%d'|mica_percent((a, b))`. (With
//! a variable on the left it stays an arithmetic operator, and fails on strings.)
//!
//! The left operands of `~` and `+` go through a filter that counts them: `a|mica_piece ~ b` (see `bounds`). Filters
//! bind tighter than both, so what is counted is the operand's last part; every part of a long sum is one.

use super::bounds::PIECE;
use std::borrow::Cow;
use std::ops::Range;

/// The variable printed where a block begins.
pub(super) const BEGIN: &str = "mica_generation_begin";
/// The variable printed where it ends.
pub(super) const END: &str = "mica_generation_end";

/// The filter that formats in Python's way.
pub(super) const PERCENT: &str = "mica_percent";

/// The rewritten source, and whether it has `{% generation %}` blocks.
pub(super) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 256);
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("{#") {
            rest.find("#}").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("{{") {
            let length = inside(rest, "}}");
            out.push_str(&pieces(&percent(&rest[..length])));
            rest = &rest[length..];
            continue;
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
                _ => {
                    out.push_str(&pieces(&percent(tag)));
                    rest = &rest[length..];
                    continue;
                }
            }
        } else {
            1
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    (out, found)
}

/// A tag with `'…' % operand` as a filter call.
fn percent(tag: &str) -> Cow<'_, str> {
    if !tag[2..].trim_end_matches("%}").contains('%') {
        return Cow::Borrowed(tag);
    }
    let bytes = tag.as_bytes();
    // What is replaced by what; operands may hold such operators themselves.
    let mut changes: Vec<(Range<usize>, String)> = Vec::new();
    let mut i = 2;
    while i < bytes.len() {
        if !matches!(bytes[i], b'"' | b'\'') {
            i += 1;
            continue;
        }
        i = string_end(tag, i);
        let operator = skip_space(tag, i);
        if !tag[operator..].starts_with('%') || tag[operator..].starts_with("%}") {
            continue;
        }
        let start = skip_space(tag, operator + 1);
        let end = operand_end(tag, start);
        if end > start {
            changes.push((i..start, format!("|{PERCENT}(")));
            changes.push((end..end, ")".to_owned()));
            // `a % b % c` is `(a % b) % c`: a string on the right is not on the left of the next.
            i = if matches!(bytes[start], b'"' | b'\'') { string_end(tag, start) } else { start };
        }
    }
    changes.sort_by_key(|(range, _)| range.start);
    let mut out = String::with_capacity(tag.len() + 16 * changes.len());
    let mut done = 0;
    for (range, text) in changes {
        out.push_str(&tag[done..range.start]);
        out.push_str(&text);
        done = range.end;
    }
    out.push_str(&tag[done..]);
    Cow::Owned(out)
}

/// A tag whose sums are counted.
fn pieces(tag: &str) -> Cow<'_, str> {
    if !tag.ends_with("}}") && !tag.ends_with("%}") {
        return Cow::Borrowed(tag);
    }
    // Whitespace control at the edges is no operator.
    let (left, right) = edges(tag);
    let (start, end) = (2 + left.len(), tag.len().saturating_sub(2 + right.len()));
    if start >= end || !tag[start..end].contains(['~', '+']) {
        return Cow::Borrowed(tag);
    }
    let bytes = tag.as_bytes();
    let (mut out, mut done, mut i) = (String::with_capacity(tag.len() + 64), 0, start);
    while i < end {
        if matches!(bytes[i], b'"' | b'\'') {
            i = string_end(tag, i);
            continue;
        }
        if matches!(bytes[i], b'~' | b'+') && ends_operand(&tag[start..i]) {
            out.push_str(&tag[done..i]);
            out.push_str(&format!("|{PIECE} "));
            done = i;
        }
        i += 1;
    }
    out.push_str(&tag[done..]);
    Cow::Owned(out)
}

/// Whether an operand may end here, rather than that an operator or the exponent of a number goes on.
fn ends_operand(before: &str) -> bool {
    let tight = before.ends_with(|c: char| !c.is_whitespace());
    let before = before.trim_end();
    if before.ends_with([')', ']', '}', '"', '\'']) {
        return true;
    }
    let word = before.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    let exponent = tight && word.starts_with(|c: char| c.is_ascii_digit()) && word.ends_with(['e', 'E']);
    !word.is_empty() && !exponent
}

fn skip_space(text: &str, from: usize) -> usize {
    text.len() - text[from..].trim_start().len()
}

/// Where a string literal that begins at `start` ends.
fn string_end(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    let mut i = start + 1;
    while i < bytes.len() && bytes[i] != bytes[start] {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    let mut end = (i + 1).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    end
}

/// Where a bracketed expression that begins at `start` ends; `start` if it does not, or only after very long (which
/// bounds the work that a template of nothing but brackets can cause).
fn bracket_end(text: &str, start: usize) -> usize {
    const LONGEST: usize = 4096;
    let bytes = &text.as_bytes()[..text.len().min(start + LONGEST)];
    let (mut depth, mut i) = (0usize, start);
    while i < bytes.len() {
        match bytes[i] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return i + 1;
                }
            }
            b'"' | b'\'' => {
                i = string_end(text, i);
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    start
}

/// Where an operand ends: a literal, name or bracket with what binds tighter than `%` (members, calls, filters).
fn operand_end(text: &str, start: usize) -> usize {
    let word = |at: usize| {
        at + text[at..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len() - at)
    };
    let mut end = match text.as_bytes().get(start) {
        Some(b'(' | b'[' | b'{') => bracket_end(text, start),
        Some(b'"' | b'\'') => string_end(text, start),
        _ => word(start),
    };
    if end == start {
        return start;
    }
    loop {
        let rest = text[end..].trim_start();
        let at = text.len() - rest.len();
        let next = match rest.as_bytes().first() {
            Some(b'.') => word(at + 1),
            Some(b'(' | b'[') => bracket_end(text, at),
            Some(b'|') => word(text.len() - rest[1..].trim_start().len()),
            _ => return end,
        };
        if next <= at + 1 {
            return end;
        }
        end = next;
    }
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
    let inner = tag.strip_suffix("%}").or(tag.strip_suffix("}}")).unwrap_or(tag);
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
            let (rewritten, found) = rewrite(source);
            assert_eq!(found, marked, "{source}");
            assert!(found || rewritten == source, "{source}");
        }
    }

    #[test]
    fn edges_are_kept() {
        assert_eq!(
            rewrite("a {%- generation +%} b {% endgeneration -%} c").0,
            format!(
                "a {{%- with %}}{{{{ {BEGIN} }}}}{{% if true +%}} b {{% endif %}}{{{{ {END} }}}}{{% endwith -%}} c"
            )
        );
    }

    #[test]
    fn sums_are_counted() {
        for (source, expected) in [
            ("{{ a ~ b.c('~') + d[0] }}", "{{ a |mica_piece ~ b.c('~') |mica_piece + d[0] }}"),
            ("{%+ set x = x~'+' +%}", "{%+ set x = x|mica_piece ~'+' +%}"),
            ("{{+ 1e+5 + -2 }}", "{{+ 1e+5 |mica_piece + -2 }}"),
            ("{% if x %}+{% endif +%}", "{% if x %}+{% endif +%}"),
            ("{{ '~ + ' }}~", "{{ '~ + ' }}~"),
            ("{{ ~ + é~é }}", "{{ ~ + é|mica_piece ~é }}"),
            ("{{ a ~ 日", "{{ a ~ 日"),
        ] {
            assert_eq!(rewrite(source).0, expected, "{source}");
        }
    }

    #[test]
    fn formatting_becomes_a_filter() {
        for (source, expected) in [
            ("{{ '%s-%d' % (a, b) }}", "{{ '%s-%d'|mica_percent((a, b)) }}"),
            (
                "{{ '%s' % a.b[1]('x)')|upper ~ c }}",
                "{{ '%s'|mica_percent(a.b[1]('x)')|upper) |mica_piece ~ c }}",
            ),
            ("{% if '%s%%' % '%s' % x == y %}", "{% if '%s%%'|mica_percent('%s') % x == y %}"),
            ("{{ a % 2 % 3 }}", "{{ a % 2 % 3 }}"),
            ("{% set x = '50% of %' %}", "{% set x = '50% of %' %}"),
            ("{{ '%s' % ('%d' % a, 'x') }}", "{{ '%s'|mica_percent(('%d'|mica_percent(a), 'x')) }}"),
            ("{{ '%s%s' % }}", "{{ '%s%s' % }}"),
            ("{{ '%é%s' %", "{{ '%é%s' %"),
            ("{{ '%s %' % (a", "{{ '%s %' % (a"),
            ("{{ '%s %é", "{{ '%s %é"),
            ("text '%s' % x", "text '%s' % x"),
        ] {
            assert_eq!(rewrite(source).0, expected, "{source}");
        }
        // Bounded, however much is nested.
        let deep = format!("{{{{ {} }}}}", "'' % (".repeat(100_000));
        assert!(rewrite(&deep).0.starts_with("{{ '' % ("));
    }
}
