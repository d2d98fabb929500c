//! npy and npz.

use std::path::Path;

use mica_io::{npy, npz};

use super::{dtype_from_file, dtype_to_file, file_error};
use crate::{Array, Error, Result};

fn array(op: &'static str, name: &str, read: npy::Npy) -> Result<Array> {
    let dtype = dtype_from_file(read.dtype)
        .ok_or_else(|| Error::unsupported(op, format!("{name}: dtype {}", read.dtype)))?;
    Array::from_bytes(&read.bytes, &read.shape, dtype)
}

/// The array of a `.npy` file.
pub fn load_npy(path: impl AsRef<Path>) -> Result<Array> {
    let path = path.as_ref();
    array("load", &path.display().to_string(), npy::read(path).map_err(file_error("load"))?)
}

/// Writes an array to a `.npy` file, atomically. NumPy has no bfloat16.
pub fn save_npy(path: impl AsRef<Path>, array: &Array) -> Result<()> {
    let fail = file_error("save");
    array
        .with_bytes(|bytes| npy::write(path, dtype_to_file(array.dtype()), array.shape(), bytes))?
        .map_err(fail)
}

/// All arrays of a `.npz` file, with their names, in the file's order.
pub fn load_npz(path: impl AsRef<Path>) -> Result<Vec<(String, Array)>> {
    let fail = file_error("load");
    let file = npz::Npz::open(path).map_err(&fail)?;
    file.names()
        .map(|name| Ok((name.to_string(), array("load", name, file.read(name).map_err(&fail)?)?)))
        .collect()
}

/// Writes arrays to a `.npz` file, atomically and uncompressed.
pub fn save_npz(path: impl AsRef<Path>, arrays: &[(String, Array)]) -> Result<()> {
    save_archive(path, arrays, false)
}

/// Writes arrays to a compressed `.npz` file, atomically. Weights hardly shrink; masks and codes do.
pub fn save_npz_compressed(path: impl AsRef<Path>, arrays: &[(String, Array)]) -> Result<()> {
    save_archive(path, arrays, true)
}

fn save_archive(path: impl AsRef<Path>, arrays: &[(String, Array)], compress: bool) -> Result<()> {
    crate::eval(&arrays.iter().map(|(_, array)| array.clone()).collect::<Vec<_>>())?;
    let bytes: Vec<Vec<u8>> =
        arrays.iter().map(|(_, array)| array.with_bytes(<[u8]>::to_vec)).collect::<Result<_>>()?;
    let named: Vec<npz::Named> = arrays
        .iter()
        .zip(&bytes)
        .map(|((name, array), bytes)| {
            (name.as_str(), dtype_to_file(array.dtype()), array.shape(), bytes.as_slice())
        })
        .collect();
    npz::write(path, &named, compress).map_err(file_error("save"))
}
