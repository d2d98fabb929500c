//! Golden files: expected values made by other programs, as safetensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::Value;

/// A safetensors file held in memory, for expected values in tests.
///
/// Reads floats, integers of all sizes and BOOL (U64 as bytes only). Every getter panics with the file's and
/// the tensor's name when something is not as asked.
#[derive(Debug)]
pub struct Golden {
    path: PathBuf,
    data: Vec<u8>,
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    /// Where the bytes are in `Golden::data`.
    start: usize,
    end: usize,
}

impl Golden {
    /// Reads a whole file. Fixtures say in the script beside them how they are made again.
    #[track_caller]
    pub fn load(path: impl AsRef<Path>) -> Golden {
        let path = path.as_ref();
        let data = std::fs::read(path).unwrap_or_else(|e| panic!("golden file {}: {e}", path.display()));
        match Golden::parse(path, data) {
            Ok(golden) => golden,
            Err(what) => panic!("golden file {}: {what}", path.display()),
        }
    }

    fn parse(path: &Path, data: Vec<u8>) -> Result<Golden, String> {
        let length = data.get(..8).ok_or("shorter than 8 bytes")?;
        let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
        let body = usize::try_from(length)
            .ok()
            .and_then(|n| n.checked_add(8))
            .filter(|&n| n <= data.len())
            .ok_or_else(|| format!("header of {length} bytes in a file of {}", data.len()))?;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&data[8..body]).map_err(|e| format!("header: {e}"))?;
        let mut tensors = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (name, entry) in header {
            if name == "__metadata__" {
                // MLX writes null where there is none.
                let entry: Option<BTreeMap<String, String>> =
                    serde_json::from_value(entry).map_err(|e| format!("metadata: {e}"))?;
                metadata = entry.unwrap_or_default();
                continue;
            }
            let tensor = Tensor::parse(&entry, body)
                .filter(|t| t.end <= data.len())
                .ok_or_else(|| format!("tensor {name}: {entry}"))?;
            tensors.insert(name, tensor);
        }
        Ok(Golden { path: path.to_owned(), data, tensors, metadata })
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The text stored under `key` in the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A tensor's shape.
    #[track_caller]
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensor(name).shape
    }

    /// A tensor's type, as the file spells it: `F32`, `BF16`, `I64`…
    #[track_caller]
    pub fn dtype(&self, name: &str) -> &str {
        &self.tensor(name).dtype
    }

    /// A tensor's bytes: row-major, little-endian.
    #[track_caller]
    pub fn bytes(&self, name: &str) -> &[u8] {
        let tensor = self.tensor(name);
        &self.data[tensor.start..tensor.end]
    }

    /// A tensor of any type as f32 (64-bit types are rounded).
    #[track_caller]
    pub fn f32s(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        match self.dtype(name) {
            "F32" => map(bytes, f32::from_le_bytes),
            "F64" => map(bytes, |b| f64::from_le_bytes(b) as f32),
            "F16" => map(bytes, |b| f16::from_le_bytes(b).to_f32()),
            "BF16" => map(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => self.i64s(name).into_iter().map(|v| v as f32).collect(),
        }
    }

    /// A tensor of any type as f64 (I64 is rounded past 2^53).
    #[track_caller]
    pub fn f64s(&self, name: &str) -> Vec<f64> {
        match self.dtype(name) {
            "F64" => map(self.bytes(name), f64::from_le_bytes),
            "F32" | "F16" | "BF16" => self.f32s(name).into_iter().map(f64::from).collect(),
            _ => self.i64s(name).into_iter().map(|v| v as f64).collect(),
        }
    }

    /// A tensor of an integer type or BOOL as i64.
    #[track_caller]
    pub fn i64s(&self, name: &str) -> Vec<i64> {
        let bytes = self.bytes(name);
        match self.dtype(name) {
            "I64" => map(bytes, i64::from_le_bytes),
            "I32" => map(bytes, |b| i32::from_le_bytes(b).into()),
            "U32" => map(bytes, |b| u32::from_le_bytes(b).into()),
            "I16" => map(bytes, |b| i16::from_le_bytes(b).into()),
            "U16" => map(bytes, |b| u16::from_le_bytes(b).into()),
            "I8" => map(bytes, |b| i8::from_le_bytes(b).into()),
            "U8" | "BOOL" => map(bytes, |[b]: [u8; 1]| b.into()),
            other => panic!("{}: {name} is {other}, not integers", self.path.display()),
        }
    }

    /// A tensor of an integer type whose values all fit, as u32.
    #[track_caller]
    pub fn u32s(&self, name: &str) -> Vec<u32> {
        let fit = |v: i64| {
            u32::try_from(v)
                .unwrap_or_else(|_| panic!("{}: {name} holds {v}, not a u32", self.path.display()))
        };
        self.i64s(name).into_iter().map(fit).collect()
    }

    #[track_caller]
    fn tensor(&self, name: &str) -> &Tensor {
        match self.tensors.get(name) {
            Some(tensor) => tensor,
            None => panic!(
                "{}: no tensor {name}; there are {:?}",
                self.path.display(),
                self.tensors.keys().collect::<Vec<_>>()
            ),
        }
    }
}

impl Tensor {
    /// Reads one header entry; None when it is not well formed or its size does not fit its shape.
    fn parse(entry: &Value, body: usize) -> Option<Tensor> {
        let dtype = entry.get("dtype")?.as_str()?.to_owned();
        let size = match dtype.as_str() {
            "F64" | "I64" | "U64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            "I8" | "U8" | "BOOL" => 1,
            _ => return None,
        };
        let integers = |key: &str| -> Option<Vec<usize>> {
            let values = entry.get(key)?.as_array()?;
            values.iter().map(|v| Some(v.as_u64()? as usize)).collect()
        };
        let shape = integers("shape")?;
        let bytes = shape.iter().try_fold(size, |n: usize, &d| n.checked_mul(d))?;
        let [start, end] = integers("data_offsets")?.try_into().ok()?;
        let (start, end) = (start.checked_add(body)?, end.checked_add(body)?);
        (end.checked_sub(start)? == bytes).then_some(Tensor { dtype, shape, start, end })
    }
}

fn map<T, const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    let chunks = bytes.chunks_exact(N);
    chunks.map(|c| f(c.try_into().expect("N bytes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, body: &[u8]) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(body);
        file
    }

    #[test]
    fn reads_each_type() {
        let mut body = Vec::new();
        let mut header = vec![r#""__metadata__":{"made_by":"a test"}"#.to_owned()];
        let mut add = |name: &str, dtype: &str, shape: &str, bytes: &[u8]| {
            let (start, end) = (body.len(), body.len() + bytes.len());
            body.extend_from_slice(bytes);
            header.push(format!(
                r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#
            ));
        };
        add("f32", "F32", "[1,2]", &[1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat());
        add("f64", "F64", "[]", &0.25f64.to_le_bytes());
        add("f16", "F16", "[1]", &f16::from_f32(0.5).to_le_bytes());
        add("bf16", "BF16", "[1]", &bf16::from_f32(-3.0).to_le_bytes());
        add("i64", "I64", "[1]", &(-5i64).to_le_bytes());
        add("i32", "I32", "[1]", &(-6i32).to_le_bytes());
        add("u32", "U32", "[1]", &u32::MAX.to_le_bytes());
        add("u8", "U8", "[3]", &[1, 2, 255]);
        add("bool", "BOOL", "[2]", &[0, 1]);
        add("none", "F32", "[0,7]", &[]);
        let data = file(&format!("{{{}}}", header.join(",")), &body);
        let golden = Golden::parse(Path::new("test"), data).unwrap();

        assert_eq!(golden.metadata("made_by"), Some("a test"));
        assert_eq!(golden.names().count(), 10);
        assert_eq!(golden.shape("f32"), [1, 2]);
        assert_eq!(golden.f32s("f32"), [1.5, -2.0]);
        assert_eq!(golden.f64s("f64"), [0.25]);
        assert_eq!(golden.shape("f64"), [] as [usize; 0]);
        assert_eq!(golden.f32s("f16"), [0.5]);
        assert_eq!(golden.f32s("bf16"), [-3.0]);
        assert_eq!(golden.i64s("i64"), [-5]);
        assert_eq!(golden.i64s("i32"), [-6]);
        assert_eq!(golden.u32s("u32"), [u32::MAX]);
        assert_eq!(golden.f32s("u8"), [1.0, 2.0, 255.0]);
        assert_eq!(golden.u32s("bool"), [0, 1]);
        assert_eq!(golden.f32s("none"), [] as [f32; 0]);
    }

    #[test]
    fn refuses_broken_files() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let cases = [
            ("no header", vec![1, 2, 3]),
            ("header beyond the file", u64::MAX.to_le_bytes().to_vec()),
            ("not JSON", file("{", &[])),
            ("beyond the end", file(&entry("U8", "[4]", "[0,4]"), &[0; 3])),
            ("size differs from shape", file(&entry("F32", "[4]", "[0,4]"), &[0; 16])),
            ("unknown type", file(&entry("Q4", "[4]", "[0,4]"), &[0; 16])),
            ("negative range", file(&entry("U8", "[0]", "[4,0]"), &[0; 16])),
        ];
        for (name, data) in cases {
            assert!(Golden::parse(Path::new(name), data).is_err(), "{name}");
        }
    }
}
