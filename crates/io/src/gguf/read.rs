//! Opening a file and reading tensors out of it.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::{ALIGNMENT_KEY, Array, BlockType, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, Value};
use crate::input::InputFile;
use crate::{Error, Result};

/// Arrays may hold arrays, so deep: each level is a call.
const MAX_DEPTH: usize = 8;

/// A tensor as the file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    name: String,
    block_type: BlockType,
    shape: Vec<usize>,
    /// Where its bytes are in the data.
    start: u64,
    end: u64,
}

impl GgufTensor {
    /// Its name in this file, e.g. `blk.0.attn_q.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its elements are stored.
    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    /// Its dimensions, the slowest first (the reverse of the file's).
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
    pub fn byte_len(&self) -> usize {
        // Equal to `block_type.bytes_of(shape)`, a usize.
        (self.end - self.start) as usize
    }
}

/// An open GGUF file.
///
/// Metadata are in memory, tensors are read on request, from any number of threads.
#[derive(Debug)]
pub struct Gguf {
    file: InputFile,
    version: u32,
    /// Where the data begins in the file.
    data: u64,
    metadata: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file and checks everything but the tensors' content.
    ///
    /// # Errors
    /// Anything the system answers; [`Error::BadData`] when the file is malformed, big-endian, of
    /// an unknown version, or has tensors of an unknown type.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        let path = path.as_ref();
        let file = InputFile::open(path)?;
        let mut reader = Reader { file: &file, buffer: Vec::new(), at: 0, buffer_end: 0 };
        let version = reader.preamble()?;
        let tensor_count = reader.u64("the number of tensors")?;
        let metadata_count = reader.u64("the number of metadata entries")?;
        let metadata = reader.metadata(metadata_count)?;
        let by_key: HashMap<_, _> = metadata.iter().map(|(key, _)| key.clone()).zip(0..).collect();

        let alignment = match by_key.get(ALIGNMENT_KEY).map(|&i| &metadata[i].1) {
            None => DEFAULT_ALIGNMENT,
            // ggml wants a power of two; more than a huge page serves nobody.
            Some(&Value::U32(v)) if v.is_power_of_two() && v <= 1 << 21 => v.into(),
            Some(value) => {
                let what = format!("{ALIGNMENT_KEY} is {value:?}, not a power of two up to 2 MiB as U32");
                return Err(Error::bad_data(path, what));
            }
        };
        let tensors = reader.tensors(tensor_count, alignment)?;
        // Without tensors there may be no data section, and then no padding before it.
        let data =
            reader.at.next_multiple_of(alignment).min(if tensors.is_empty() { file.len() } else { u64::MAX });
        check_places(&tensors, alignment, file.len().checked_sub(data))
            .map_err(|e| Error::bad_data(path, e))?;
        let by_name = tensors.iter().map(|t| t.name.clone()).zip(0..).collect();
        Ok(Gguf { version, data, metadata, by_key, tensors, by_name, file })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, in the order of the file.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value stored under `key`, if there is one.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&i| &self.metadata[i].1)
    }

    /// The text under `key`; None if there is no such key, an error if it is no text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a text", Value::as_str)
    }

    /// The integer under `key`; None if there is no such key, an error if it is no integer from 0
    /// on.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer from 0 on", Value::as_u64)
    }

    /// The number under `key`; None if there is no such key, an error if it is no number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// The truth value under `key`; None if there is no such key, an error if it is none.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// The texts under `key`; None if there is no such key, an error if they are no texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "a list of texts", |v| v.as_array().and_then(Array::as_strings))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let shown: String = format!("{value:?}").chars().take(80).collect();
                Err(Error::bad_data(self.path(), format!("{key:?} should be {expected}, but is {shown}")))
            }
        }
    }

    /// All tensors, in the order of the file's list.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&GgufTensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The tensor called `name`, or an error that says it is missing.
    pub fn require(&self, name: &str) -> Result<&GgufTensor> {
        self.get(name).ok_or_else(|| Error::missing(self.path(), format!("has no tensor {name:?}")))
    }

    /// All bytes of the tensor called `name`.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.require(name)?;
        self.file.read_vec(self.data + tensor.start, tensor.byte_len())
    }

    /// Fills `out` with the bytes of a tensor of this file from its byte `offset` on.
    pub fn read_range(&self, tensor: &GgufTensor, offset: usize, out: &mut [u8]) -> Result<()> {
        if offset.checked_add(out.len()).is_none_or(|end| end > tensor.byte_len()) {
            let what = format!(
                "tensor {:?} has {} bytes, asked for {} from {offset} on",
                tensor.name,
                tensor.byte_len(),
                out.len(),
            );
            return Err(Error::invalid(self.path(), what));
        }
        self.file.read_at(self.data + tensor.start + offset as u64, out)
    }

    /// All bytes of a tensor of this file, into `out`, which must be as long.
    pub fn read_into(&self, tensor: &GgufTensor, out: &mut [u8]) -> Result<()> {
        if out.len() != tensor.byte_len() {
            let (has, asked) = (tensor.byte_len(), out.len());
            let what = format!("tensor {:?} has {has} bytes, asked for {asked}", tensor.name);
            return Err(Error::invalid(self.path(), what));
        }
        self.read_range(tensor, 0, out)
    }
}

/// `data_len`: bytes of the file's data section, None if the file ends before it.
fn check_places(tensors: &[GgufTensor], alignment: u64, data_len: Option<u64>) -> Result<(), String> {
    let mut order: Vec<&GgufTensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.start, t.end));
    let mut end = 0u64;
    let mut previous = "";
    for GgufTensor { name, start, end: this_end, .. } in order {
        if data_len.is_none_or(|len| *this_end > len) {
            return Err(format!(
                "tensor {name:?}: data from {start} to {this_end} leaves the file, which holds {} bytes of \
                 data; it has been cut short, fetch it again",
                data_len.unwrap_or(0)
            ));
        }
        if *start < end {
            return Err(format!("tensors {previous:?} and {name:?} overlap at byte {start}"));
        }
        if start - end >= alignment {
            return Err(format!("hole of {} bytes before tensor {name:?} at byte {start}", start - end));
        }
        end = *this_end;
        previous = name;
    }
    Ok(())
}

/// Reads the file's beginning from front to back. Each length is checked against what is left of
/// the file before anything of that length is made.
struct Reader<'a> {
    file: &'a InputFile,
    /// Bytes of the file up to `buffer_end`.
    buffer: Vec<u8>,
    buffer_end: u64,
    /// Position in the file.
    at: u64,
}

impl Reader<'_> {
    fn bad(&self, what: String) -> Error {
        Error::bad_data(self.file.path(), format!("at byte {}: {what}", self.at))
    }

    fn left(&self) -> u64 {
        self.file.len() - self.at
    }

    /// The next `n` bytes, which are `what`.
    fn bytes(&mut self, n: u64, what: &str) -> Result<&[u8]> {
        if n > self.left() {
            return Err(self.bad(format!("{what} takes {n} bytes, but the file ends after {}", self.left())));
        }
        let n = n as usize; // At most the file's length, about to be held in memory.
        let buffered = (self.buffer_end - self.at) as usize;
        if n > buffered {
            let len = (n as u64).max(1 << 16).min(self.left());
            self.buffer = self.file.read_vec(self.at, len as usize)?;
            self.buffer_end = self.at + len;
        }
        let start = self.buffer.len() - (self.buffer_end - self.at) as usize;
        self.at += n as u64;
        Ok(&self.buffer[start..start + n])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.bytes(N as u64, what)?.try_into().expect("N bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let text = str::from_utf8(self.bytes(len, what)?).map(str::to_owned);
        text.map_err(|e| self.bad(format!("{what} is not UTF-8: {e}")))
    }

    fn boolean(&mut self) -> Result<bool> {
        match self.array("a truth value")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.bad(format!("truth value {other}, neither 0 nor 1"))),
        }
    }

    fn preamble(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.array("the magic number")?;
        if magic != MAGIC {
            return Err(Error::bad_data(self.file.path(), "does not begin like a GGUF file"));
        }
        let version = self.u32("the version")?;
        let what = match version {
            2 | 3 => return Ok(version),
            1 => "is GGUF version 1, from 2023; convert it with llama.cpp".to_owned(),
            _ if (1..=0xffff).contains(&version.swap_bytes()) => {
                "is a big-endian GGUF file; only little-endian ones are read".to_owned()
            }
            _ => format!("is GGUF version {version}; known are 2 and 3"),
        };
        Err(Error::bad_data(self.file.path(), what))
    }

    /// A vector for `count` items of at least `size` bytes each, which must be in the file.
    fn room<T>(&self, count: u64, size: u64, what: &str) -> Result<Vec<T>> {
        if count.checked_mul(size).is_none_or(|bytes| bytes > self.left()) {
            return Err(self.bad(format!("{count} {what} do not fit in the {} bytes left", self.left())));
        }
        Ok(Vec::new())
    }

    fn metadata(&mut self, count: u64) -> Result<Vec<(String, Value)>> {
        // A key's length, a type, and a value of a byte.
        let mut out = self.room(count, 8 + 4 + 1, "metadata entries")?;
        let mut seen = HashSet::new();
        for _ in 0..count {
            let key = self.text("a metadata key")?;
            if key.len() > 0xffff {
                return Err(self.bad(format!("metadata key of {} bytes, more than 65535", key.len())));
            }
            if !seen.insert(key.clone()) {
                return Err(self.bad(format!("metadata key {key:?} occurs twice")));
            }
            let number = self.u32("the type of a metadata value")?;
            let value = self.value(number)?;
            out.push((key, value));
        }
        Ok(out)
    }

    fn value(&mut self, type_number: u32) -> Result<Value> {
        let what = "a metadata value";
        Ok(match type_number {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.boolean()?),
            8 => Value::String(self.text(what)?),
            9 => Value::Array(self.values(0)?),
            10 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            other => return Err(self.bad(format!("unknown type {other} of a metadata value"))),
        })
    }

    /// An array: the type of its values, their number, and they.
    fn values(&mut self, depth: usize) -> Result<Array> {
        if depth == MAX_DEPTH {
            return Err(self.bad(format!("arrays within arrays, deeper than {MAX_DEPTH}")));
        }
        let type_number = self.u32("the type of an array")?;
        let count = self.u64("the length of an array")?;
        Ok(match type_number {
            0 => Array::U8(self.numbers(count, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            7 => {
                let mut out = self.room(count, 1, "truth values")?;
                for _ in 0..count {
                    out.push(self.boolean()?);
                }
                Array::Bool(out)
            }
            8 => {
                let mut out = self.room(count, 8, "texts")?;
                for _ in 0..count {
                    out.push(self.text("a text of an array")?);
                }
                Array::String(out)
            }
            9 => {
                let mut out = self.room(count, 12, "arrays")?;
                for _ in 0..count {
                    out.push(self.values(depth + 1)?);
                }
                Array::Array(out)
            }
            10 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
            other => return Err(self.bad(format!("unknown type {other} of an array"))),
        })
    }

    fn numbers<T, const N: usize>(&mut self, count: u64, decode: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.room::<T>(count, N as u64, "numbers")?;
        let bytes = self.bytes(count * N as u64, "an array of numbers")?;
        Ok(bytes.chunks_exact(N).map(|c| decode(c.try_into().expect("N bytes"))).collect())
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<GgufTensor>> {
        // A name's length, the number of dimensions, the type and the offset.
        let mut out = self.room(count, 8 + 4 + 4 + 8, "tensors")?;
        let mut seen = HashSet::new();
        for _ in 0..count {
            let name = self.text("the name of a tensor")?;
            if !seen.insert(name.clone()) {
                return Err(self.bad(format!("tensor {name:?} occurs twice")));
            }
            let rank = self.u32("the number of dimensions")? as usize;
            if rank > MAX_RANK {
                return Err(self.bad(format!("tensor {name:?}: {rank} dimensions, more than {MAX_RANK}")));
            }
            let mut shape = Vec::with_capacity(rank);
            for _ in 0..rank {
                let size = self.u64("a dimension")?;
                shape.push(usize::try_from(size).map_err(|_| {
                    self.bad(format!("tensor {name:?}: dimension {size} is no possible size"))
                })?);
            }
            shape.reverse();
            let number = self.u32("the type of a tensor")?;
            let Some(block_type) = BlockType::from_number(number) else {
                let known: Vec<&str> = BlockType::all().map(BlockType::name).collect();
                let known = known.join(", ");
                return Err(self.bad(format!("tensor {name:?}: unknown type {number}; known are {known}")));
            };
            let start = self.u64("the offset of a tensor")?;
            let bytes =
                block_type.bytes_of(&shape).map_err(|what| self.bad(format!("tensor {name:?}: {what}")))?;
            if start % alignment != 0 {
                let what = format!("tensor {name:?}: offset {start} is no multiple of {alignment}");
                return Err(self.bad(what));
            }
            let Some(end) = start.checked_add(bytes as u64) else {
                return Err(self.bad(format!("tensor {name:?}: offset {start} leaves the file")));
            };
            out.push(GgufTensor { name, block_type, shape, start, end });
        }
        Ok(out)
    }
}
