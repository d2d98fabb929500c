//! The header's text, and every check on it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{MAX_RANK, METADATA, TensorInfo};
use crate::DType;
use crate::strict_json::Members;

/// A header that has passed the checks.
#[derive(Debug)]
pub(super) struct Header {
    /// In the order of their data.
    pub tensors: Vec<TensorInfo>,
    pub metadata: BTreeMap<String, String>,
}

/// Reads a header whose file holds `data_len` bytes of data. The error says what is wrong with it.
pub(super) fn parse(text: &[u8], data_len: u64) -> Result<Header, String> {
    let text = std::str::from_utf8(text).map_err(|e| format!("header is not UTF-8: {e}"))?;
    if !text.starts_with('{') {
        return Err("header does not begin with '{'; this is no safetensors file".to_owned());
    }
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| format!("header: {e}"))?;
    let mut tensors = raw
        .tensors
        .into_iter()
        .map(|(name, tensor)| check_tensor(name, tensor, data_len))
        .collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|t| (t.start, t.end));
    check_coverage(&tensors, data_len)?;
    Ok(Header { tensors, metadata: raw.metadata.into_iter().collect() })
}

fn check_tensor(name: String, raw: RawTensor, data_len: u64) -> Result<TensorInfo, String> {
    let problem = |what: String| Err(format!("tensor {name:?}: {what}"));
    let RawTensor { dtype, shape, data_offsets: (start, end) } = raw;
    let Some(dtype) = DType::from_name(&dtype) else {
        let known: Vec<&str> = DType::all().map(DType::name).collect();
        return problem(format!("unknown dtype {dtype:?}; known are {}", known.join(", ")));
    };
    if shape.len() > MAX_RANK {
        return problem(format!("{} dimensions, more than {MAX_RANK}", shape.len()));
    }
    let sizes: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let bytes = sizes.as_deref().and_then(|shape| dtype.bytes_of(shape));
    let (Some(sizes), Some(bytes)) = (sizes, bytes) else {
        return problem(format!("{dtype} {shape:?} is no possible size"));
    };
    if start > end {
        return problem(format!("data from {start} to {end} ends before it begins"));
    }
    if end - start != bytes as u64 {
        return problem(format!(
            "{dtype} {shape:?} takes {bytes} bytes, but its data from {start} to {end} has {}",
            end - start
        ));
    }
    if end > data_len {
        return problem(format!(
            "data from {start} to {end} leaves the file, which holds {data_len} bytes of data; it \
             has been cut short, fetch it again"
        ));
    }
    Ok(TensorInfo { name, dtype, shape: sizes, start, end })
}

/// `tensors` are in the order of their data.
fn check_coverage(tensors: &[TensorInfo], data_len: u64) -> Result<(), String> {
    let mut end = 0;
    let mut previous = None;
    for tensor in tensors {
        let name = &tensor.name;
        if tensor.start < end {
            let other = previous.unwrap_or("");
            return Err(format!("tensors {other:?} and {name:?} overlap at byte {}", tensor.start));
        }
        if tensor.start > end {
            let (hole, start) = (tensor.start - end, tensor.start);
            return Err(format!("hole of {hole} bytes before tensor {name:?} at byte {start}"));
        }
        end = tensor.end;
        previous = Some(name.as_str());
    }
    if end != data_len {
        return Err(format!("{} bytes after the last tensor belong to none", data_len - end));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: Vec<(String, String)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

/// The header is an object in which one key means something else than all others.
struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader { tensors: Vec::new(), metadata: Vec::new() };
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("{name:?} occurs twice")));
            }
            if name == METADATA {
                let metadata: Option<Members<String>> = map.next_value()?;
                header.metadata = metadata.map_or_else(Vec::new, |members| members.0);
            } else {
                header.tensors.push((name, map.next_value()?));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    }

    fn header(entries: &[String]) -> String {
        format!("{{{}}}", entries.join(","))
    }

    #[test]
    fn accepted_headers() {
        let deep_field = format!(
            r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{}{}}}}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        let cases = [
            ("empty", "{}".to_owned(), 0, 0),
            ("padded", "{}   \n".to_owned(), 0, 0),
            ("null metadata", r#"{"__metadata__":null}"#.to_owned(), 0, 0),
            ("scalar", header(&[entry("a", "F32", "[]", 0, 4)]), 4, 1),
            (
                "empty tensors anywhere",
                header(&[
                    entry("a", "F32", "[2]", 0, 8),
                    entry("b", "I64", "[0,5]", 0, 0),
                    entry("c", "I64", "[5,0]", 8, 8),
                    entry("d", "U8", "[1]", 8, 9),
                ]),
                9,
                4,
            ),
            ("any order", header(&[entry("z", "U8", "[3]", 2, 5), entry("a", "U8", "[2]", 0, 2)]), 5, 2),
            ("less than a byte", header(&[entry("a", "F4", "[3,2]", 0, 3)]), 3, 1),
            (
                "fields of the future",
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":[{}]}}"#.to_owned(),
                1,
                1,
            ),
            ("deep fields of the future", deep_field, 1, 1),
        ];
        for (name, text, data_len, tensors) in cases {
            let header = parse(text.as_bytes(), data_len).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(header.tensors.len(), tensors, "{name}");
        }
    }

    #[test]
    fn refused_headers() {
        let u8s = |name: &str, start: u64, end: u64| {
            entry(name, "U8", &format!("[{}]", end.saturating_sub(start)), start, end)
        };
        let half = 1u64 << 63;
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let ranks = format!("[{}]", vec!["1"; 65].join(","));
        // Name, header, bytes of data, part of the message.
        let cases: &[(&str, String, u64, &str)] = &[
            ("not an object", "[]".into(), 0, "does not begin"),
            ("leading space", " {}".into(), 0, "does not begin"),
            ("nothing", "".into(), 0, "does not begin"),
            ("cut", "{\"a\":".into(), 0, "EOF"),
            ("text after it", "{}x".into(), 0, "trailing"),
            ("deep value", deep, 1, "invalid type"),
            ("out of range", header(&[u8s("a", 0, 5)]), 4, "leaves the file"),
            ("far out of range", header(&[u8s("a", half, half + 4)]), 4, "leaves the file"),
            ("backwards", header(&[u8s("a", 4, 0)]), 4, "ends before it begins"),
            ("same bytes twice", header(&[u8s("a", 0, 4), u8s("b", 0, 4)]), 4, "overlap"),
            ("overlap by one", header(&[u8s("a", 0, 3), u8s("b", 2, 4)]), 4, "\"a\" and \"b\" overlap"),
            ("hole", header(&[u8s("a", 0, 1), u8s("b", 2, 4)]), 4, "hole of 1"),
            ("hole at the start", header(&[u8s("a", 1, 4)]), 4, "hole of 1"),
            ("bytes left over", header(&[u8s("a", 0, 3)]), 4, "1 bytes after"),
            ("only data", "{}".into(), 4, "4 bytes after"),
            ("equal names", header(&[u8s("a", 0, 2), u8s("a", 2, 4)]), 4, "occurs twice"),
            (
                "equal fields",
                r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#.into(),
                1,
                "duplicate field",
            ),
            ("two metadata", r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "occurs twice"),
            ("equal metadata keys", r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, "occurs twice"),
            ("metadata not text", r#"{"__metadata__":{"a":1}}"#.into(), 0, "expected a string"),
            ("unknown dtype", header(&[entry("a", "Q4", "[4]", 0, 4)]), 4, "unknown dtype"),
            ("dtype in lower case", header(&[entry("a", "u8", "[4]", 0, 4)]), 4, "unknown dtype"),
            (
                "shape overflows",
                header(&[entry("a", "U8", "[4294967296,4294967296]", 0, 0)]),
                0,
                "no possible size",
            ),
            (
                "bytes overflow",
                header(&[entry("a", "F64", "[2305843009213693952]", 0, 0)]),
                0,
                "no possible size",
            ),
            (
                "overflow hidden by a zero",
                header(&[entry("a", "U8", "[9223372036854775807,4,0]", 0, 0)]),
                0,
                "no possible size",
            ),
            (
                "dimension past 64 bits",
                header(&[entry("a", "U8", "[18446744073709551616]", 0, 0)]),
                0,
                "expected u64",
            ),
            ("negative dimension", header(&[entry("a", "U8", "[-1]", 0, 1)]), 1, "expected u64"),
            ("fraction", header(&[entry("a", "U8", "[1.0]", 0, 1)]), 1, "expected u64"),
            ("half a byte", header(&[entry("a", "F4", "[3]", 0, 1)]), 1, "no possible size"),
            ("too many dimensions", header(&[entry("a", "U8", &ranks, 0, 1)]), 1, "65 dimensions"),
            ("size differs", header(&[entry("a", "F32", "[2]", 0, 4)]), 4, "takes 8 bytes"),
            ("three offsets", r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#.into(), 1, ""),
            ("no offsets", r#"{"a":{"dtype":"U8","shape":[1]}}"#.into(), 1, "missing field"),
        ];
        for (name, text, data_len, message) in cases {
            let error = parse(text.as_bytes(), *data_len).expect_err(name);
            assert!(error.contains(message), "{name}: {error}");
        }
        assert!(parse(b"{\"\xff\":1}", 0).unwrap_err().contains("UTF-8"));
    }
}
