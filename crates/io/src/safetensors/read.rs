//! Opening a file and reading tensors out of it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::MAX_HEADER;
use super::header::{self, Header};
use crate::input::InputFile;
use crate::{DType, Error, Result};

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Where its bytes are in the data.
    pub(super) start: u64,
    pub(super) end: u64,
}

impl TensorInfo {
    /// Its name in this file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its dimensions, the slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
    pub fn byte_len(&self) -> usize {
        // Equal to `dtype.bytes_of(shape)`, a usize, as the header's check has shown.
        (self.end - self.start) as usize
    }
}

/// An open safetensors file.
///
/// Only the header is in memory. Tensors are read on request, from any number of threads.
#[derive(Debug)]
pub struct SafeTensors {
    file: InputFile,
    /// Where the data begins in the file.
    data: u64,
    header: Header,
    by_name: HashMap<String, usize>,
}

impl SafeTensors {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// Anything the system answers; [`Error::BadData`] when the header is malformed or does not
    /// fit the file.
    pub fn open(path: impl AsRef<Path>) -> Result<SafeTensors> {
        let path = path.as_ref();
        let file = InputFile::open(path)?;
        if file.len() < 8 {
            let what = format!("has {} bytes, too few for a safetensors file", file.len());
            return Err(Error::bad_data(path, what));
        }
        let mut length = [0; 8];
        file.read_at(0, &mut length)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER {
            let what =
                format!("header of {length} bytes, more than {MAX_HEADER}; this is no safetensors file");
            return Err(Error::bad_data(path, what));
        }
        let data = 8 + length;
        if data > file.len() {
            let what = format!(
                "header of {length} bytes leaves the file of {}; it has been cut short, fetch it \
                 again",
                file.len()
            );
            return Err(Error::bad_data(path, what));
        }
        // At most 100 MB, and no more than the file has.
        let text = file.read_vec(8, length as usize)?;
        let header = header::parse(&text, file.len() - data).map_err(|e| Error::bad_data(path, e))?;
        let names = header.tensors.iter().map(|t| t.name.clone());
        let by_name = names.zip(0..).collect();
        Ok(SafeTensors { file, data, header, by_name })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// All tensors in the order of their data: reading in this order reads the file from front to
    /// back.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.header.tensors[i])
    }

    /// The tensor called `name`, or an error that says it is missing.
    pub fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name).ok_or_else(|| Error::missing(self.path(), format!("has no tensor {name:?}")))
    }

    /// The texts that come with the file, e.g. `format`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// All bytes of the tensor called `name`.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.require(name)?;
        self.file.read_vec(self.data + info.start, info.byte_len())
    }

    /// All bytes of a tensor of this file, into `out`, which must have
    /// [`byte_len`](TensorInfo::byte_len) bytes.
    pub fn read_into(&self, info: &TensorInfo, out: &mut [u8]) -> Result<()> {
        if out.len() != info.byte_len() {
            let what =
                format!("tensor {:?} has {} bytes, asked for {}", info.name, info.byte_len(), out.len());
            return Err(Error::invalid(self.path(), what));
        }
        self.read_range(info, 0, out)
    }

    /// Fills `out` with a tensor's bytes from its byte `offset` on.
    pub fn read_range(&self, info: &TensorInfo, offset: usize, out: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(out.len());
        if end.is_none_or(|end| end > info.byte_len()) {
            let what = format!(
                "tensor {:?} has {} bytes, asked for {} from {offset} on",
                info.name,
                info.byte_len(),
                out.len(),
            );
            return Err(Error::invalid(self.path(), what));
        }
        self.file.read_at(self.data + info.start + offset as u64, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const HEADER: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;

    fn file(length: u64, header: &str, data: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.safetensors");
        let bytes = [&length.to_le_bytes(), header.as_bytes(), data].concat();
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn reads_tensors_whole_and_in_part() {
        let data: Vec<u8> = (0..11).collect();
        let (_folder, path) = file(HEADER.len() as u64, HEADER, &data);
        let file = SafeTensors::open(&path).unwrap();
        assert_eq!(file.metadata()["format"], "pt");
        let names: Vec<&str> = file.tensors().iter().map(TensorInfo::name).collect();
        assert_eq!(names, ["a", "b"]);
        let a = file.get("a").unwrap();
        assert_eq!((a.dtype(), a.shape()), (DType::F32, &[1, 2][..]));
        assert_eq!((a.elements(), a.byte_len()), (2, 8));
        assert_eq!(file.read("a").unwrap(), &data[..8]);
        let b = file.get("b").unwrap();
        let mut out = [0; 3];
        file.read_into(b, &mut out).unwrap();
        assert_eq!(out, [8, 9, 10]);
        let mut out = [0; 2];
        file.read_range(b, 1, &mut out).unwrap();
        assert_eq!(out, [9, 10]);
        file.read_range(b, 3, &mut []).unwrap();

        assert!(file.read_into(b, &mut out).is_err(), "too few bytes asked for");
        assert!(file.read_range(b, 2, &mut out).is_err(), "past the tensor's end");
        assert!(file.read_range(b, usize::MAX, &mut out).is_err(), "overflow");
        assert!(file.get("c").is_none());
        assert_eq!(file.read("c").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn refuses_files_whose_header_does_not_fit() {
        let n = HEADER.len() as u64;
        let cases = [
            ("length beyond the file", n + 12, HEADER, 11),
            ("length of all bits", u64::MAX, HEADER, 11),
            ("length past the limit", MAX_HEADER + 1, HEADER, 11),
            ("length at the limit", MAX_HEADER, HEADER, 11),
            ("length too short", n - 1, HEADER, 11),
            ("length zero", 0, HEADER, 11),
            ("data cut short", n, HEADER, 10),
            ("data too long", n, HEADER, 12),
        ];
        for (name, length, header, data) in cases {
            let (_folder, path) = file(length, header, &vec![0; data]);
            let error = SafeTensors::open(&path).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::BadData, "{name}: {error}");
            assert!(error.to_string().contains("f.safetensors"), "{name}: {error}");
        }
        let (_folder, path) = file(0, "", &[]);
        for len in 0..8 {
            std::fs::write(&path, vec![0; len]).unwrap();
            assert!(SafeTensors::open(&path).is_err(), "file of {len} bytes");
        }
    }
}
