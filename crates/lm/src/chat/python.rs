//! What templates expect of Python and the engine does otherwise: JSON as `json.dumps` writes it, and methods of
//! strings, lists and dictionaries beyond those of `minijinja_contrib::pycompat`.

use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

use super::bounds;

/// A method that the engine does not know on a value.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, args)?
    {
        return Ok(result);
    }
    if value.kind() == ValueKind::Seq && name == "index" {
        let (wanted,): (&Value,) = from_args(args)?;
        for (i, item) in value.try_iter()?.enumerate() {
            if item == *wanted {
                return Ok(i.into());
            }
        }
        return Err(invalid(format!("{wanted:?} is not in the list")));
    }
    if name == "join"
        && let (Some(between), [list]) = (value.as_str(), args)
    {
        bounds::charge(bounds::joined(list, between.len()))?;
    }
    if value.kind() == ValueKind::Map && name == "copy" {
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Python's whitespace: Unicode's, and four control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let strip = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(strip) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(strip) })
        }
        "replace" => {
            let (from, to, most): (&str, &str, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            Value::from(bounds::replaced(text, from, to, most)?)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut pieces: Vec<Value> = match separator {
                Some("") => return Err(invalid("empty separator")),
                Some(separator) => text.rsplitn(most, separator).map(Value::from).collect(),
                None => rsplit_space(text, most).into_iter().map(Value::from).collect(),
            };
            pieces.reverse();
            Value::from(pieces)
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            triple(text.split_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or([text, "", ""]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            triple(text.rsplit_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or(["", "", text]))
        }
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            match text.find(wanted) {
                Some(at) => text[..at].chars().count().into(),
                None => return Err(invalid("substring not found")),
            }
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => (&text[..1], digits),
                None => ("", text),
            };
            let missing = bounded(width)?.saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let missing = bounded(width)?.saturating_sub(text.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Python puts the odd one left if the width is odd.
                _ => missing / 2 + (missing & width & 1),
            };
            let fill = fill.unwrap_or(" ");
            Value::from(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
        }
        "title" => {
            // A letter after anything but a letter begins a word.
            let mut inside = false;
            let mut title = String::with_capacity(text.len());
            for c in text.chars() {
                if inside {
                    title.extend(c.to_lowercase());
                } else {
                    title.extend(c.to_uppercase());
                }
                inside = c.is_alphabetic();
            }
            Value::from(title)
        }
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|c| -> Vec<char> {
                    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
                })
                .collect::<String>(),
        ),
        _ => return Ok(None),
    }))
}

fn triple(parts: [&str; 3]) -> Value {
    Value::from(Tuple::from(parts.map(Value::from)))
}

/// Splits at runs of whitespace from the right, into at most `most` pieces, last first.
fn rsplit_space(text: &str, most: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if pieces.len() + 1 == most {
            pieces.push(rest);
            break;
        }
        let start =
            rest.rfind(is_space).map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
        pieces.push(&rest[start..]);
        rest = rest[..start].trim_end_matches(is_space);
    }
    pieces
}

/// A width for padding that does not fill memory.
fn bounded(width: usize) -> Result<usize, Error> {
    if width > 1 << 20 { Err(invalid(format!("a width of {width} is too large"))) } else { Ok(width) }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Python's `'…' % value`: a tuple's items are the arguments, anything else is the only one.
pub(super) fn percent(template: &str, value: &Value) -> Result<String, Error> {
    use minijinja::formatting::{FormatStyle, format};
    if value.is_tuple() {
        format(FormatStyle::Printf, template, &value.try_iter()?.collect::<Vec<_>>())
    } else {
        format(FormatStyle::Printf, template, std::slice::from_ref(value))
    }
}

/// Jinja's `int` filter: what is no number becomes the default instead of an error.
pub(super) fn int(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get::<Option<Value>>("default")?).unwrap_or_else(|| 0.into());
    let base: u32 = kwargs.get::<Option<u32>>("base")?.unwrap_or(10);
    kwargs.assert_all_used()?;
    if !(2..=36).contains(&base) {
        return Ok(default);
    }
    Ok(match value.kind() {
        ValueKind::Bool => i64::from(value.is_true()).into(),
        ValueKind::Number => match i128::try_from(value.clone()) {
            Ok(whole) => whole.into(),
            Err(_) => f64::try_from(value.clone()).map_or(default, |x| Value::from(x as i128)),
        },
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim_matches(is_space).replace('_', "");
            match (i128::from_str_radix(&text, base), text.parse::<f64>()) {
                (Ok(whole), _) => whole.into(),
                (Err(_), Ok(x)) if base == 10 && x.is_finite() => Value::from(x as i128),
                _ => default,
            }
        }
        _ => default,
    })
}

/// Jinja's `float` filter: what is no number becomes the default instead of an error.
pub(super) fn float(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get::<Option<Value>>("default")?).unwrap_or_else(|| 0.0.into());
    kwargs.assert_all_used()?;
    Ok(match value.kind() {
        ValueKind::Bool => Value::from(if value.is_true() { 1.0 } else { 0.0 }),
        ValueKind::Number => f64::try_from(value.clone()).map_or(default, Value::from),
        ValueKind::String => value
            .as_str()
            .unwrap_or_default()
            .trim_matches(is_space)
            .parse::<f64>()
            .map_or(default, Value::from),
        _ => default,
    })
}

/// `tojson` as `transformers` defines it: `json.dumps(x, ensure_ascii=False, indent=None, separators=None,
/// sort_keys=False)`.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut options = ["ensure_ascii", "indent", "separators", "sort_keys"].map(|name| (name, None));
    if args.len() > options.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    for (i, (name, option)) in options.iter_mut().enumerate() {
        *option = args.get(i).cloned().or(kwargs.get::<Option<Value>>(name)?).filter(|v| !v.is_none());
    }
    kwargs.assert_all_used()?;
    let [(_, ascii), (_, indent), (_, separators), (_, sort)] = options;
    let indent = match &indent {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let spaces =
                    i64::try_from(value.clone()).map_err(|_| invalid("tojson: indent must be a number"))?;
                " ".repeat(usize::try_from(spaces).unwrap_or(0).min(64))
            }
        }),
    };
    let separator = |i: usize| -> Result<Option<String>, Error> {
        let Some(pair) = &separators else { return Ok(None) };
        match pair.get_item_by_index(i)?.as_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(invalid("tojson: separators must be two strings")),
        }
    };
    let mut json = Json {
        item: separator(0)?.unwrap_or_else(|| if indent.is_some() { "," } else { ", " }.into()),
        key: separator(1)?.unwrap_or_else(|| ": ".into()),
        ascii: ascii.is_some_and(|v| v.is_true()),
        sort: sort.is_some_and(|v| v.is_true()),
        indent,
        out: String::new(),
    };
    json.value(value, 0)?;
    bounds::charge(json.out.len())?;
    Ok(Value::from(json.out))
}

struct Json {
    item: String,
    key: String,
    indent: Option<String>,
    ascii: bool,
    sort: bool,
    out: String,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > 200 {
            return Err(invalid("tojson: nested more than 200 deep"));
        }
        bounds::fits(self.out.len())?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float_text(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    pairs.push((key_text(&key)?, item));
                }
                if self.sort {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container('{', '}', pairs.iter(), depth, |json, (key, item)| {
                    json.string(key);
                    let separator = json.key.clone();
                    json.out.push_str(&separator);
                    json.value(item, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.container('[', ']', value.try_iter()?, depth, |json, item| {
                    json.value(&item, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("tojson: a value of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = T>,
        depth: usize,
        mut write: impl FnMut(&mut Self, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                let separator = self.item.clone();
                self.out.push_str(&separator);
            }
            empty = false;
            self.line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                // Sentinels of this module are noncharacters and must come through as they are.
                c if (c as u32) < 0x20
                    || self.ascii && !c.is_ascii() && !super::guard::may_be_sentinel(c) =>
                {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A key as `json.dumps` writes it.
fn key_text(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::None => "null".into(),
        ValueKind::Bool => key.is_true().to_string(),
        ValueKind::Number if key.is_integer() => key.to_string(),
        ValueKind::Number => float_text(f64::try_from(key.clone())?),
        kind => return Err(invalid(format!("tojson: a key of type {kind} is not JSON serializable"))),
    })
}

/// A float as Python prints it.
pub(super) fn float_text(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(expression: &str) -> String {
        let (source, _) = super::super::source::rewrite(&format!("{{{{ {expression} }}}}"));
        let env = super::super::environment::new(source, 100_000, 100).unwrap();
        match super::super::environment::run(&env, Default::default(), None, 1 << 20) {
            Ok(text) => text,
            Err(e) => format!("error: {}", super::super::environment::describe(&e)),
        }
    }

    /// Right-hand sides are what Python 3.11 with jinja2 3.1 prints.
    #[test]
    fn as_python_has_it() {
        for (expression, expected) in [
            ("' a\\x1f\\u00a0'.strip() ~ '|'", "a|"),
            ("'xxabxx'.strip('x')", "ab"),
            ("'xxabxx'.lstrip('x')", "abxx"),
            ("'a.b.c'.rsplit('.', 1)|join('|')", "a.b|c"),
            ("' a b  c '.rsplit()|join('|')", "a|b|c"),
            ("' a b  c '.rsplit(none, 1)|join('|')", " a b|c"),
            ("' a b  c '.split()|join('|')", "a|b|c"),
            ("'a,b,c'.split(',', 1)|join('|')", "a|b,c"),
            ("'a=b=c'.partition('=')|join('|')", "a|=|b=c"),
            ("'a=b=c'.rpartition('=')|join('|')", "a=b|=|c"),
            ("'abc'.removeprefix('a') ~ 'abc'.removesuffix('c')", "bcab"),
            ("'-5'.zfill(4) ~ 'ab'.center(5, '*') ~ 'abc'.center(6, '*')", "-005**ab**abc**"),
            ("'ab'.ljust(4) ~ '|' ~ 'ab'.rjust(4)", "ab  |  ab"),
            ("'héllo'.index('l')", "2"),
            ("[1, 2, 3].index(2)", "1"),
            ("{'a': 1}.copy().items()|list", "[('a', 1)]"),
            ("'12x'|int ~ ' ' ~ '12'|int ~ ' ' ~ '1.9'|int ~ ' ' ~ none|int(7)", "0 12 1 7"),
            ("'x'|float ~ ' ' ~ '1.5'|float", "0.0 1.5"),
            (
                "{'b': [1, 2.0, 1e-7, 1e16, true, none], 'a': 'é<&\"\\n\\x01'}|tojson",
                r#"{"b": [1, 2.0, 1e-07, 1e+16, true, null], "a": "é<&\"\n\u0001"}"#,
            ),
            ("{'b': 1, 'a': []}|tojson(sort_keys=true)", r#"{"a": [], "b": 1}"#),
            (
                "{'a': [1, {}], 'b': {'c': 2}}|tojson(indent=2)",
                "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": {\n    \"c\": 2\n  }\n}",
            ),
            ("'é😀'|tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00""#),
            ("[1, {'a': 2}]|tojson(separators=(',', ':'))", r#"[1,{"a":2}]"#),
            ("{2: 2, none: 3}|tojson", r#"{"2": 2, "null": 3}"#),
            ("true ~ none ~ 1.0 ~ [true, 'a']", "TrueNone1.0[True, 'a']"),
            ("'abc' is sequence ~ {} is sequence ~ 1 is sequence", "TrueTrueFalse"),
            ("'abc' is iterable ~ 1 is iterable ~ none is iterable", "TrueFalseFalse"),
            ("[1, 2, 3][::-1] ~ 'abc'[1:] ~ [1, 2][-1]", "[3, 2, 1]bc2"),
            ("'%s-%d'|format('a', 3) ~ '{} {x}'.format(1, x=2)", "a-31 2"),
            ("'ab' * 2", "abab"),
            (
                "'aXbXc'.replace('X', '--', 1) ~ 'ab'.replace('', '-') ~ 'aXX'|replace('X', 'y')",
                "a--bXc-a-b-ayy",
            ),
            ("'aXbX'.replace('X', '', -1) ~ 'aX'.replace('X', 'y', 0)", "abaX"),
            ("'-'.join(['a', 'b']) ~ [1, 2]|join(', ') ~ [{'a': 3}]|join('', attribute='a')", "a-b1, 23"),
            ("'a\nb'|indent(2) ~ '|' ~ 'a\nb'|indent(width=1, first=true)", "a\n  b| a\n b"),
            (
                "[3, 1, 2]|sort(reverse=true)|list ~ [1, 1]|unique|list ~ [[1, 2]]|map('first')|list",
                "[3, 2, 1][1][1]",
            ),
            (
                "[{'a': 1}, {'a': 2}]|selectattr('a', 'equalto', 2)|list ~ ([1] + [2])|string",
                "[{'a': 2}][1, 2]",
            ),
            ("(1 + 2) ~ (3 + 4) ~ 'x + y' ~ (5 if none is defined else 6)", "37x + y5"),
            ("\"it's <|im_end|> o2x éA\".title()", "It'S <|Im_End|> O2X Éa"),
            ("'%s is %05.1f' % ('x', 2.25) ~ '%d%%' % 5", "x is 002.25%"),
        ] {
            assert_eq!(eval(expression), expected, "{expression}");
        }
    }

    #[test]
    fn floats_print_as_in_python() {
        for (x, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-10, "1.5e-10"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (0.1, "0.1"),
        ] {
            assert_eq!(float_text(x), expected);
        }
    }
}
