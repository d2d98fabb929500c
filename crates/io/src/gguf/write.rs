//! Writing a file, tensor by tensor.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use super::metadata::encode_text;
use super::{ALIGNMENT_KEY, BlockType, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, Value};
use crate::atomic::AtomicFile;
use crate::content::{ContentResult, Source};
use crate::{Error, Result};

/// A GGUF file (version 3) to be written: metadata and tensors in the order they are added.
///
/// The alignment is 32; a `general.alignment` in the metadata must agree.
#[derive(Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Entry<'a>>,
}

struct Entry<'a> {
    name: String,
    block_type: BlockType,
    shape: Vec<usize>,
    source: Source<'a>,
}

impl<'a> GgufWriter<'a> {
    /// A file without metadata and tensors.
    pub fn new() -> GgufWriter<'a> {
        GgufWriter::default()
    }

    /// Adds an entry to the metadata.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        self.metadata.push((key.into(), value.into()));
        self
    }

    /// Adds a tensor. `shape` has the slowest dimension first; `bytes` are its blocks in that
    /// order.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        block_type: BlockType,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> &mut Self {
        let source = Source::Bytes(bytes);
        self.tensors.push(Entry { name: name.into(), block_type, shape: shape.to_vec(), source });
        self
    }

    /// Adds a tensor whose bytes `content` writes when their turn comes. It must write exactly as
    /// many as the type and shape say. Its errors end up in [`Error::Content`].
    pub fn stream(
        &mut self,
        name: impl Into<String>,
        block_type: BlockType,
        shape: &[usize],
        content: impl FnOnce(&mut dyn Write) -> ContentResult + 'a,
    ) -> &mut Self {
        let source = Source::Stream(Box::new(content));
        self.tensors.push(Entry { name: name.into(), block_type, shape: shape.to_vec(), source });
        self
    }

    /// Writes the file, through [`AtomicFile`]: on any error map_err(|what| problem(&what)) was at `path` stays.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names or keys that occur twice, shapes that do not fit their type,
    /// and numbers of bytes that do not fit either; [`Error::Content`] when a closure fails;
    /// [`Error::Io`].
    pub fn write(self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (header, sizes) = self.header().map_err(|what| Error::invalid(path, what))?;
        let mut file = AtomicFile::create(path)?;
        let io = |e| Error::io("write", path, e);
        file.write_all(&header).map_err(io)?;
        for (entry, &size) in self.tensors.into_iter().zip(&sizes) {
            entry.source.write(&mut file, size, path, &entry.name)?;
            let padding = size.next_multiple_of(DEFAULT_ALIGNMENT) - size;
            file.write_all(&[0; DEFAULT_ALIGNMENT as usize][..padding as usize]).map_err(io)?;
        }
        file.commit()
    }

    /// Everything before the data, and the bytes of each tensor.
    fn header(&self) -> Result<(Vec<u8>, Vec<u64>), String> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        let mut keys = HashSet::new();
        for (key, value) in &self.metadata {
            if !keys.insert(key) {
                return Err(format!("metadata key {key:?} is given twice"));
            }
            if key.len() > 0xffff {
                return Err(format!("metadata key of {} bytes, more than 65535", key.len()));
            }
            if key == ALIGNMENT_KEY && *value != Value::U32(DEFAULT_ALIGNMENT as u32) {
                return Err(format!("{ALIGNMENT_KEY} is {value:?}, but files are written with 32"));
            }
            encode_text(key, &mut out);
            out.extend_from_slice(&value.type_number().to_le_bytes());
            value.encode(&mut out);
        }
        let mut names = HashSet::new();
        let mut sizes = Vec::with_capacity(self.tensors.len());
        let mut offset = 0u64;
        for Entry { name, block_type, shape, source } in &self.tensors {
            let problem = |what: &str| format!("tensor {name:?}: {what}");
            if !names.insert(name) {
                return Err(problem("is given twice"));
            }
            if shape.len() > MAX_RANK {
                return Err(problem("has more than 4 dimensions"));
            }
            let size = block_type.bytes_of(shape).map_err(|what| problem(&what))?;
            if let Some(given) = source.mismatch(size) {
                return Err(problem(&format!(
                    "{block_type} {shape:?} takes {size} bytes, {given} were given"
                )));
            }
            encode_text(name, &mut out);
            out.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            for &d in shape.iter().rev() {
                out.extend_from_slice(&(d as u64).to_le_bytes());
            }
            out.extend_from_slice(&block_type.number().to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            let end =
                offset.checked_add(size as u64).and_then(|n| n.checked_next_multiple_of(DEFAULT_ALIGNMENT));
            offset = end.ok_or("the tensors together are too large")?;
            sizes.push(size as u64);
        }
        out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        Ok((out, sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Array, Gguf};
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let values = [
            ("general.architecture", Value::from("llama")),
            ("general.alignment", Value::U32(32)),
            ("u8", Value::U8(1)),
            ("i8", Value::I8(-1)),
            ("u16", Value::U16(2)),
            ("i16", Value::I16(-2)),
            ("i32", Value::I32(-3)),
            ("f32", Value::F32(0.5)),
            ("bool", Value::Bool(true)),
            ("u64", Value::U64(u64::MAX)),
            ("i64", Value::I64(i64::MIN)),
            ("f64", Value::F64(-0.25)),
            ("tokens", Value::from(vec!["a".to_owned(), "é".to_owned(), String::new()])),
            ("scores", Value::from(vec![0.5f32, -1.0])),
            ("flags", Value::from(vec![true, false])),
            ("empty", Value::from(Vec::<i32>::new())),
            (
                "nested",
                Value::Array(Array::Array(vec![Array::U8(vec![1, 2]), Array::String(vec!["x".into()])])),
            ),
        ];
        let q8: Vec<u8> = (0..2 * 34).collect();
        let f32s: Vec<u8> = (0..24).collect();
        let mut writer = GgufWriter::new();
        for (key, value) in &values {
            writer.metadata(*key, value.clone());
        }
        writer
            .tensor("q", BlockType::Q8_0, &[2, 32], &q8)
            .stream("f", BlockType::F32, &[2, 3], |out| Ok(out.write_all(&f32s)?))
            .tensor("none", BlockType::F16, &[0], &[]);
        writer.write(&path).unwrap();

        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.version(), 3);
        let got: Vec<_> = file.metadata().iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        assert_eq!(got, values);
        assert_eq!(file.text("general.architecture").unwrap(), Some("llama"));
        assert_eq!(file.unsigned("u8").unwrap(), Some(1));
        assert_eq!(file.number("f32").unwrap(), Some(0.5));
        assert_eq!(file.boolean("bool").unwrap(), Some(true));
        assert_eq!(file.texts("tokens").unwrap().unwrap().len(), 3);
        assert_eq!(file.unsigned("no such key").unwrap(), None);
        let error = file.unsigned("i8").unwrap_err().to_string();
        assert!(error.contains("\"i8\" should be an integer from 0 on, but is I8(-1)"), "{error}");

        assert_eq!(file.read("q").unwrap(), q8);
        assert_eq!(file.read("f").unwrap(), f32s);
        assert!(file.read("none").unwrap().is_empty());
        let q = file.require("q").unwrap();
        assert_eq!((q.block_type(), q.shape(), q.elements()), (BlockType::Q8_0, &[2, 32][..], 64));
        let mut row = [0; 34];
        file.read_range(q, 34, &mut row).unwrap();
        assert_eq!(row, q8[34..]);
        assert!(file.read_range(q, 35, &mut row).is_err());
        assert!(file.read_into(q, &mut row).is_err());
    }

    #[test]
    fn without_tensors_and_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        GgufWriter::new().write(&path).unwrap();
        assert!(Gguf::open(&path).unwrap().tensors().is_empty());
        // As llama.cpp's vocabulary files end: no padding.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(24).unwrap();
        assert!(Gguf::open(&path).unwrap().tensors().is_empty());
    }

    #[test]
    fn mistakes_leave_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        type Build = fn(&mut GgufWriter);
        let cases: &[(&str, Build)] = &[
            ("equal keys", |w| {
                w.metadata("a", 1u32).metadata("a", 2u32);
            }),
            ("other alignment", |w| {
                w.metadata("general.alignment", 64u32);
            }),
            ("equal names", |w| {
                w.tensor("a", BlockType::I8, &[1], &[1]).tensor("a", BlockType::I8, &[1], &[1]);
            }),
            ("five dimensions", |w| {
                w.tensor("a", BlockType::I8, &[1; 5], &[1]);
            }),
            ("part of a block", |w| {
                w.tensor("a", BlockType::Q8_0, &[31], &[1; 34]);
            }),
            ("too few bytes", |w| {
                w.tensor("a", BlockType::Q8_0, &[32], &[1; 33]);
            }),
            ("short stream", |w| {
                w.stream("a", BlockType::I8, &[2], |out| Ok(out.write_all(&[1])?));
            }),
        ];
        for (name, build) in cases {
            let mut writer = GgufWriter::new();
            build(&mut writer);
            assert!(writer.write(&path).is_err(), "{name}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{name}");
        }
    }
}
