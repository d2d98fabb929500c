//! NumPy's file of one array.
//!
//! ```text
//! \x93NUMPY  major minor  length of the header (2 bytes in version 1, 4 in 2 and 3)
//! {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }      a Python literal, padded
//! data
//! ```
//!
//! Reads versions 1 to 3 and turns whatever order and endianness into row-major little-endian.
//! Writes version 1. Objects (`|O`) are pickles, which can run code: they are refused.

use std::path::Path;

use crate::atomic::{self, AtomicFile};
use crate::input::InputFile;
use crate::{DType, Error, Result};

mod literal;

const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header accepted, in bytes; that of a plain array has a hundred.
const MAX_HEADER: usize = 1 << 20;

/// An array read from a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Npy {
    /// The type of its elements.
    pub dtype: DType,
    /// Its dimensions, the slowest first.
    pub shape: Vec<usize>,
    /// Its elements, row-major and little-endian.
    pub bytes: Vec<u8>,
}

/// NumPy's letters and sizes for the types it can name. It has no name for bfloat16.
const DESCRIPTIONS: [(&str, DType); 13] = [
    ("b1", DType::Bool),
    ("i1", DType::I8),
    ("u1", DType::U8),
    ("i2", DType::I16),
    ("u2", DType::U16),
    ("i4", DType::I32),
    ("u4", DType::U32),
    ("i8", DType::I64),
    ("u8", DType::U64),
    ("f2", DType::F16),
    ("f4", DType::F32),
    ("f8", DType::F64),
    ("c8", DType::C64),
];

/// Reads a `.npy` file.
pub fn read(path: impl AsRef<Path>) -> Result<Npy> {
    let path = path.as_ref();
    let file = InputFile::open(path)?;
    let len = usize::try_from(file.len()).map_err(|_| Error::bad_data(path, "is too large for memory"))?;
    // The longest preamble first, so that a file whose header promises what the file does not
    // hold is refused before its data is read.
    let start = file.read_vec(0, len.min(12 + MAX_HEADER))?;
    let header = Header::parse(&start, len).map_err(|what| Error::bad_data(path, what))?;
    let bytes = file.read_vec(header.data as u64, len - header.data)?;
    Ok(header.array(bytes))
}

/// Reads the content of a `.npy` file. The error says what is wrong with it.
pub fn parse(content: &[u8]) -> Result<Npy, String> {
    parse_vec(content.to_vec())
}

/// [`parse`] for a content that is no longer needed.
pub(crate) fn parse_vec(mut content: Vec<u8>) -> Result<Npy, String> {
    let header = Header::parse(&content, content.len())?;
    content.drain(..header.data);
    Ok(header.array(content))
}

/// Writes a `.npy` file. `bytes` are the elements, row-major and little-endian.
///
/// # Errors
/// [`Error::Invalid`] for types that NumPy has no name for (bfloat16 and the small floats) and
/// when the number of bytes is not that of type and shape.
pub fn write(path: impl AsRef<Path>, dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let header = header_for(dtype, shape, bytes.len()).map_err(|what| Error::invalid(path, what))?;
    atomic::write_with(path, |file: &mut AtomicFile| {
        use std::io::Write;
        file.write_all(&header)?;
        file.write_all(bytes)
    })
}

/// What comes before the data in a `.npy` file of version 1: for callers that write the data
/// piece by piece.
pub fn header(dtype: DType, shape: &[usize]) -> Result<Vec<u8>, String> {
    let Some((letters, _)) = DESCRIPTIONS.iter().find(|(_, known)| *known == dtype) else {
        return Err(format!("NumPy has no name for {dtype}; convert to float32 first"));
    };
    let order = if dtype.size() == Some(1) { '|' } else { '<' };
    let shape = match shape {
        [one] => format!("({one},)"),
        _ => format!("({})", shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
    };
    let mut text = format!("{{'descr': '{order}{letters}', 'fortran_order': False, 'shape': {shape}, }}");
    // The data begins at a multiple of 64 bytes.
    let total = (MAGIC.len() + 4 + text.len() + 1).next_multiple_of(64);
    let padded = total - MAGIC.len() - 4;
    let Ok(length) = u16::try_from(padded) else {
        return Err(format!("{} dimensions are too many", shape.len()));
    };
    text += &" ".repeat(padded - 1 - text.len());
    text.push('\n');
    Ok([MAGIC, &[1, 0], &length.to_le_bytes(), text.as_bytes()].concat())
}

/// The header of an array that is given as so many bytes.
pub(crate) fn header_for(dtype: DType, shape: &[usize], bytes: usize) -> Result<Vec<u8>, String> {
    let header = header(dtype, shape)?;
    if dtype.bytes_of(shape) != Some(bytes) {
        return Err(format!("{dtype} {shape:?} was given {bytes} bytes"));
    }
    Ok(header)
}

struct Header {
    dtype: DType,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<usize>,
    /// Where the data begins.
    data: usize,
}

impl Header {
    /// `start` is the beginning of a file of `len` bytes, or all of it.
    fn parse(start: &[u8], len: usize) -> Result<Header, String> {
        if !start.starts_with(MAGIC) {
            return Err("does not begin like a .npy file".to_owned());
        }
        let cut = || "ends within its header".to_owned();
        let [major, minor] = *start.get(6..8).ok_or_else(cut)? else { unreachable!("two bytes") };
        let (length, text) = match major {
            1 => {
                let bytes = start.get(8..10).ok_or_else(cut)?;
                (u16::from_le_bytes(bytes.try_into().expect("2 bytes")) as usize, 10)
            }
            2 | 3 => {
                let bytes = start.get(8..12).ok_or_else(cut)?;
                (u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize, 12)
            }
            _ => return Err(format!("is .npy version {major}.{minor}; known are 1, 2 and 3")),
        };
        if length > MAX_HEADER {
            return Err(format!("header of {length} bytes, more than {MAX_HEADER}"));
        }
        let data = text + length;
        let text = start.get(text..data).ok_or_else(cut)?;
        let literal::Description { descr, fortran_order, shape } = literal::parse(text)?;

        let (order, letters) = descr.split_at_checked(1).unwrap_or_default();
        let dtype = DESCRIPTIONS.iter().find(|(known, _)| *known == letters).map(|&(_, dtype)| dtype);
        let (Some(dtype), true) = (dtype, ["<", ">", "|", "="].contains(&order)) else {
            return Err(match letters.chars().next() {
                Some('O') => "holds Python objects, which are pickled and can run code".to_owned(),
                Some('V') => format!(
                    "type {descr:?} has no meaning of its own (bfloat16 is saved so); save as float32"
                ),
                _ => format!("type {descr:?} is not known"),
            });
        };
        let bytes = dtype.bytes_of(&shape).ok_or_else(|| format!("{dtype} {shape:?} is no possible size"))?;
        if len - data != bytes {
            let found = len - data;
            return Err(format!("{dtype} {shape:?} takes {bytes} bytes, the file holds {found}"));
        }
        Ok(Header { dtype, big_endian: order == ">", fortran_order, shape, data })
    }

    fn array(self, mut bytes: Vec<u8>) -> Npy {
        let size = self.dtype.size().expect("NumPy's types are whole bytes");
        if self.big_endian {
            // A complex number is two floats, each in its own order.
            let unit = if self.dtype == DType::C64 { 4 } else { size };
            bytes.chunks_exact_mut(unit).for_each(<[u8]>::reverse);
        }
        if self.fortran_order {
            bytes = to_row_major(&bytes, &self.shape, size);
        }
        Npy { dtype: self.dtype, shape: self.shape, bytes }
    }
}

/// Reorders elements of `size` bytes from column-major to row-major.
fn to_row_major(bytes: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let strides: Vec<usize> = shape
        .iter()
        .scan(size, |stride, &d| {
            let this = *stride;
            *stride *= d;
            Some(this)
        })
        .collect();
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    while out.len() < bytes.len() {
        out.extend_from_slice(&bytes[at..at + size]);
        // The next index, the last dimension fastest; `at` follows it.
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, text: &str, data: &[u8]) -> Vec<u8> {
        let mut out = [MAGIC, &[version, 0]].concat();
        match version {
            1 => out.extend_from_slice(&(text.len() as u16).to_le_bytes()),
            _ => out.extend_from_slice(&(text.len() as u32).to_le_bytes()),
        }
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(data);
        out
    }

    fn dict(descr: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n")
    }

    #[test]
    fn header_is_byte_for_byte_numpys() {
        // The first 128 bytes of `np.save(f, np.zeros((2, 3), np.float32))`.
        let mut expected = b"\x93NUMPY\x01\x00v\x00".to_vec();
        expected.extend_from_slice(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }");
        expected.resize(127, b' ');
        expected.push(b'\n');
        assert_eq!(header(DType::F32, &[2, 3]).unwrap(), expected);
        let text = |dtype, shape: &[usize]| {
            String::from_utf8_lossy(&header(dtype, shape).unwrap()[10..]).trim_end().to_owned()
        };
        assert_eq!(text(DType::U8, &[7]), dict("|u1", "False", "(7,)").trim_end());
        assert_eq!(text(DType::Bool, &[]), dict("|b1", "False", "()").trim_end());
        assert!(header(DType::BF16, &[1]).unwrap_err().contains("no name for BF16"));
    }

    #[test]
    fn reads_orders_and_versions() {
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let row_major = f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let column_major = f32s(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let mut big_endian = row_major.clone();
        big_endian.chunks_exact_mut(4).for_each(<[u8]>::reverse);
        let cases = [
            ("version 1", file(1, &dict("<f4", "False", "(2, 3)"), &row_major)),
            ("version 2", file(2, &dict("<f4", "False", "(2, 3)"), &row_major)),
            ("version 3", file(3, &dict("<f4", "False", "(2, 3)"), &row_major)),
            ("column-major", file(1, &dict("<f4", "True", "(2, 3)"), &column_major)),
            ("big-endian", file(1, &dict(">f4", "False", "(2, 3)"), &big_endian)),
        ];
        for (name, content) in cases {
            let array = parse(&content).unwrap_or_else(|e| panic!("{name}: {e}"));
            let expected = Npy { dtype: DType::F32, shape: vec![2, 3], bytes: row_major.clone() };
            assert_eq!(array, expected, "{name}");
        }
    }

    #[test]
    fn column_major_of_any_rank() {
        // Element [i, j, k] of a column-major array of shape [2, 3, 4] lies at i + 2j + 6k.
        let shape = [2, 3, 4];
        let bytes: Vec<u8> = (0..24).flat_map(|i| [i, 100 + i]).collect();
        let got = to_row_major(&bytes, &shape, 2);
        let mut expected = Vec::new();
        for i in 0..2 {
            for j in 0..3 {
                for k in 0..4 {
                    let at = i + 2 * j + 6 * k;
                    expected.extend_from_slice(&[at, 100 + at]);
                }
            }
        }
        assert_eq!(got, expected);
        assert!(to_row_major(&[], &[3, 0, 2], 4).is_empty());
        assert_eq!(to_row_major(&[7], &[], 1), [7]);
    }

    #[test]
    fn complex_numbers_swap_each_half() {
        let content = file(1, &dict(">c8", "False", "(1,)"), &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(parse(&content).unwrap().bytes, [4, 3, 2, 1, 8, 7, 6, 5]);
    }

    #[test]
    fn refused_files() {
        let good = dict("<f4", "False", "(2,)");
        let cases: &[(&str, Vec<u8>, &str)] = &[
            ("empty", vec![], "does not begin"),
            ("other file", b"PK\x03\x04".to_vec(), "does not begin"),
            ("magic only", MAGIC.to_vec(), "ends within"),
            ("version 4", file(4, &good, &[0; 8]), "version 4.0"),
            ("header cut", file(1, &good, &[])[..40].to_vec(), "ends within"),
            ("header too long", [MAGIC, &[2, 0, 255, 255, 255, 255]].concat(), "more than"),
            ("data cut", file(1, &good, &[0; 7]), "takes 8 bytes, the file holds 7"),
            ("data too long", file(1, &good, &[0; 9]), "takes 8 bytes, the file holds 9"),
            ("objects", file(1, &dict("|O", "False", "(2,)"), &[0; 8]), "can run code"),
            ("void", file(1, &dict("<V2", "False", "(2,)"), &[0; 4]), "bfloat16"),
            ("unknown type", file(1, &dict("<x4", "False", "(2,)"), &[0; 8]), "not known"),
            ("no byte order", file(1, &dict("f4", "False", "(2,)"), &[0; 8]), "not known"),
            ("no type", file(1, &dict("", "False", "(2,)"), &[0; 8]), "not known"),
            ("not ASCII", file(1, &dict("é4", "False", "(2,)"), &[0; 8]), "not known"),
            ("too large", file(1, &dict("<f4", "False", "(4611686018427387904, 4)"), &[]), "possible"),
            (
                "overflow behind zero",
                file(1, &dict("<f4", "False", "(0, 4611686018427387904, 4)"), &[]),
                "possible",
            ),
        ];
        for (name, content, message) in cases {
            let error = parse(content).expect_err(name);
            assert!(error.contains(message), "{name}: {error}");
        }
    }

    #[test]
    fn files_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        for &(_, dtype) in &DESCRIPTIONS {
            for shape in [&[][..], &[0], &[5], &[2, 0, 3], &[2, 3, 4]] {
                let bytes: Vec<u8> = (0..dtype.bytes_of(shape).unwrap()).map(|i| i as u8).collect();
                write(&path, dtype, shape, &bytes).unwrap();
                let array = read(&path).unwrap();
                assert_eq!(array, Npy { dtype, shape: shape.to_vec(), bytes });
                assert_eq!(parse(&std::fs::read(&path).unwrap()).unwrap(), array);
            }
        }
        assert!(write(&path, DType::F32, &[2], &[0; 7]).is_err());
        assert!(write(&path, DType::BF16, &[2], &[0; 4]).is_err());
        assert!(read(&path).is_ok(), "a refused write leaves the file");
    }
}
