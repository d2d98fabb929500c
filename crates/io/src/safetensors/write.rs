//! Writing a file, tensor by tensor.

use std::collections::{BTreeMap, HashSet};
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::path::Path;

use super::METADATA;
use crate::atomic::AtomicFile;
use crate::content::{ContentResult, Source};
use crate::{DType, Error, Result};

/// A safetensors file to be written.
///
/// Tensors are *supplied* in the order they are added, so that closures may share work (a
/// quantizer yields weights, scales and biases together), and *laid out* as the format's own
/// library does it: larger types first, then by name. So the same tensors give the same file in
/// whatever order they come, and each tensor is aligned to its element size.
#[derive(Default)]
pub struct Writer<'a> {
    entries: Vec<Entry<'a>>,
    metadata: BTreeMap<String, String>,
}

pub(crate) struct Entry<'a> {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub source: Source<'a>,
}

impl<'a> Writer<'a> {
    /// A file without tensors.
    pub fn new() -> Writer<'a> {
        Writer::default()
    }

    /// Adds a text to the file's metadata, or replaces the one of this key.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Adds a tensor. `bytes` are its elements, row-major and little-endian.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> &mut Self {
        self.add(Entry { name: name.into(), dtype, shape: shape.to_vec(), source: Source::Bytes(bytes) })
    }

    /// Adds a tensor whose bytes `content` writes when their turn comes. It must write exactly as
    /// many as the type and shape say. Its errors end up in [`Error::Content`].
    pub fn stream(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        content: impl FnOnce(&mut dyn Write) -> ContentResult + 'a,
    ) -> &mut Self {
        self.add(Entry {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            source: Source::Stream(Box::new(content)),
        })
    }

    pub(crate) fn add(&mut self, entry: Entry<'a>) -> &mut Self {
        self.entries.push(entry);
        self
    }

    /// Writes the file, through [`AtomicFile`]: on any error what was at `path` stays.
    ///
    /// # Errors
    /// [`Error::Invalid`] when two tensors have one name, a name is the reserved `__metadata__`,
    /// or a tensor's bytes are not as many as its type and shape say; [`Error::Content`] when a
    /// closure fails; [`Error::Io`].
    pub fn write(self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let plan = Plan::new(&self.entries, &self.metadata).map_err(|e| Error::invalid(path, e))?;
        let mut file = AtomicFile::create(path)?;
        self.write_to(&plan, &mut file, path)?;
        file.commit()
    }

    /// The content of the file, in memory.
    pub fn to_bytes(self) -> Result<Vec<u8>> {
        let path = Path::new("safetensors in memory");
        let plan = Plan::new(&self.entries, &self.metadata).map_err(|e| Error::invalid(path, e))?;
        let mut out = Cursor::new(Vec::new());
        self.write_to(&plan, &mut out, path)?;
        Ok(out.into_inner())
    }

    fn write_to(self, plan: &Plan, out: &mut (impl Write + Seek), path: &Path) -> Result<()> {
        let io = |e| Error::io("write", path, e);
        out.write_all(&plan.header).map_err(io)?;
        let mut position = plan.header.len() as u64;
        for (entry, &(start, len)) in self.entries.into_iter().zip(&plan.places) {
            if position != start {
                out.seek(SeekFrom::Start(start)).map_err(io)?;
            }
            entry.source.write(out, len, path, &entry.name)?;
            position = start + len;
        }
        Ok(())
    }
}

/// Where everything goes, known before the first byte is written.
struct Plan {
    /// The length, the JSON text and the padding.
    header: Vec<u8>,
    /// For each entry, in the order added: position in the file, and bytes.
    places: Vec<(u64, u64)>,
}

impl Plan {
    fn new(entries: &[Entry], metadata: &BTreeMap<String, String>) -> Result<Plan, String> {
        let mut names = HashSet::new();
        let mut sizes = Vec::with_capacity(entries.len());
        for Entry { name, dtype, shape, source } in entries {
            if name == METADATA {
                return Err(format!("{METADATA} cannot be the name of a tensor"));
            }
            if !names.insert(name) {
                return Err(format!("two tensors are called {name:?}"));
            }
            let size = dtype
                .bytes_of(shape)
                .ok_or_else(|| format!("tensor {name:?}: {dtype} {shape:?} is no possible size"))?;
            if let Some(given) = source.mismatch(size) {
                return Err(format!(
                    "tensor {name:?}: {dtype} {shape:?} takes {size} bytes, {given} were given"
                ));
            }
            sizes.push(size as u64);
        }

        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by(|&i, &j| {
            let (a, b) = (&entries[i], &entries[j]);
            b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
        });

        let mut members = Vec::with_capacity(entries.len() + 1);
        if !metadata.is_empty() {
            members.push(format!("{}:{}", json(METADATA), json(metadata)));
        }
        let mut places = vec![(0, 0); entries.len()];
        let mut end = 0u64;
        for i in order {
            let Entry { name, dtype, shape, .. } = &entries[i];
            let start = end;
            end = start.checked_add(sizes[i]).ok_or("the tensors together are too large")?;
            places[i] = (start, sizes[i]);
            members.push(format!(
                r#"{}:{{"dtype":"{dtype}","shape":{},"data_offsets":[{start},{end}]}}"#,
                json(name),
                json(shape),
            ));
        }
        let mut text = format!("{{{}}}", members.join(",")).into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        for (start, _) in &mut places {
            *start += header.len() as u64;
        }
        Ok(Plan { header, places })
    }
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> String {
    serde_json::to_string(value).expect("texts and integers always have a JSON form")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;

    use super::*;
    use crate::ErrorKind;
    use crate::safetensors::SafeTensors;

    #[test]
    fn layout_is_that_of_the_formats_library() {
        let mut writer = Writer::new();
        writer
            .metadata("format", "mlx")
            .tensor("z", DType::U8, &[3], &[1, 2, 3])
            .tensor("b", DType::F32, &[], &[4, 5, 6, 7])
            .tensor("a", DType::F32, &[1], &[8, 9, 10, 11])
            .tensor("e", DType::I64, &[0, 2], &[]);
        let bytes = writer.to_bytes().unwrap();
        let text = concat!(
            r#"{"__metadata__":{"format":"mlx"},"#,
            r#""e":{"dtype":"I64","shape":[0,2],"data_offsets":[0,0]},"#,
            r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
            r#""b":{"dtype":"F32","shape":[],"data_offsets":[4,8]},"#,
            r#""z":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}"#,
        );
        let padded = text.len().next_multiple_of(8);
        assert_eq!(bytes[..8], (padded as u64).to_le_bytes());
        assert_eq!(&bytes[8..8 + text.len()], text.as_bytes());
        assert!(bytes[8 + text.len()..8 + padded].iter().all(|&b| b == b' '));
        assert_eq!(bytes[8 + padded..], [8, 9, 10, 11, 4, 5, 6, 7, 1, 2, 3]);
        assert_eq!(Writer::new().to_bytes().unwrap(), b"\x08\0\0\0\0\0\0\0{}      ");
    }

    #[test]
    fn streams_are_asked_in_the_order_added() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let scales = RefCell::new(Vec::new());
        let mut writer = Writer::new();
        writer
            .stream("w.weight", DType::U8, &[2, 2], |out| {
                scales.borrow_mut().extend([5u8, 6, 7, 8]);
                out.write_all(&[1, 2])?;
                Ok(out.write_all(&[3, 4])?)
            })
            .stream("w.scales", DType::F32, &[1], |out| Ok(out.write_all(&scales.borrow())?));
        writer.write(&path).unwrap();
        let file = SafeTensors::open(&path).unwrap();
        assert_eq!(file.read("w.weight").unwrap(), [1, 2, 3, 4]);
        assert_eq!(file.read("w.scales").unwrap(), [5, 6, 7, 8]);
    }

    #[test]
    fn mistakes_leave_the_file_that_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mut old = Writer::new();
        old.tensor("old", DType::U8, &[1], &[9]);
        old.write(&path).unwrap();
        let before = std::fs::read(&path).unwrap();

        type Build = fn(&mut Writer);
        let cases: &[(&str, ErrorKind, Build)] = &[
            ("equal names", ErrorKind::Other, |w| {
                w.tensor("a", DType::U8, &[1], &[1]).tensor("a", DType::U8, &[1], &[1]);
            }),
            ("reserved name", ErrorKind::Other, |w| {
                w.tensor("__metadata__", DType::U8, &[1], &[1]);
            }),
            ("too few bytes", ErrorKind::Other, |w| {
                w.tensor("a", DType::U8, &[2], &[1]);
            }),
            ("impossible size", ErrorKind::Other, |w| {
                w.tensor("a", DType::U8, &[usize::MAX, 2], &[1]);
            }),
            ("half a byte", ErrorKind::Other, |w| {
                w.tensor("a", DType::F4, &[1], &[1]);
            }),
            ("stream ends early", ErrorKind::Other, |w| {
                w.stream("a", DType::U8, &[2], |out| Ok(out.write_all(&[1])?));
            }),
            ("stream too long", ErrorKind::Other, |w| {
                w.stream("a", DType::U8, &[2], |out| Ok(out.write_all(&[1, 2, 3])?));
            }),
            ("stream fails", ErrorKind::Other, |w| {
                w.stream("a", DType::U8, &[2], |_| Err("no data today".into()));
            }),
            ("full disk", ErrorKind::DiskFull, |w| {
                w.stream("a", DType::U8, &[2], |_| Err(io::Error::from(io::ErrorKind::StorageFull).into()));
            }),
            ("source is broken", ErrorKind::BadData, |w| {
                w.stream("a", DType::U8, &[2], |_| Err(Error::bad_data("other", "x").into()));
            }),
        ];
        for (name, kind, build) in cases {
            let mut writer = Writer::new();
            writer.tensor("first", DType::U8, &[4], &[1; 4]);
            build(&mut writer);
            let error = writer.write(&path).expect_err(name);
            assert_eq!(error.kind(), *kind, "{name}: {error}");
            assert_eq!(std::fs::read(&path).unwrap(), before, "{name}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{name}");
        }
    }
}
