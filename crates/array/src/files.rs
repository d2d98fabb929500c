//! Arrays in files: safetensors, npy, npz and GGUF.

mod gguf;
mod numpy;

use std::path::Path;

use mica_io::DType;
use mica_io::safetensors::{SafeTensors, TensorInfo, Writer};

use crate::{Array, Dtype, Error, Result};

pub use gguf::{GgufContent, load_gguf, open_gguf, pack_gguf, save_gguf};
pub use mica_io::gguf::Value as GgufValue;
pub use numpy::{load_npy, load_npz, save_npy, save_npz, save_npz_compressed};

/// The dtype of arrays that hold what files call so, if mica can compute with it.
pub fn dtype_from_file(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::Bool => Dtype::Bool,
        DType::U8 => Dtype::U8,
        DType::U16 => Dtype::U16,
        DType::U32 => Dtype::U32,
        DType::U64 => Dtype::U64,
        DType::I8 => Dtype::I8,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::C64 => Dtype::C64,
        _ => return None,
    })
}

/// What files call a dtype.
pub fn dtype_to_file(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Bool => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::U16 => DType::U16,
        Dtype::U32 => DType::U32,
        Dtype::U64 => DType::U64,
        Dtype::I8 => DType::I8,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::C64 => DType::C64,
    }
}

pub(crate) fn file_error(op: &'static str) -> impl Fn(mica_io::Error) -> Error {
    move |error| Error::File { op, kind: error.kind(), message: error.to_string().into() }
}

/// All tensors of a safetensors file, with their names, in the file's order.
pub fn load_safetensors(path: impl AsRef<Path>) -> Result<Vec<(String, Array)>> {
    let fail = file_error("load_safetensors");
    let file = SafeTensors::open(path).map_err(&fail)?;
    file.tensors()
        .iter()
        .map(|info| Ok((info.name().to_string(), read_tensor("load_safetensors", &file, info)?)))
        .collect()
}

/// One tensor of a file.
pub(crate) fn read_tensor(op: &'static str, file: &SafeTensors, info: &TensorInfo) -> Result<Array> {
    let dtype = dtype_from_file(info.dtype())
        .ok_or_else(|| Error::unsupported(op, format!("{}: dtype {}", info.name(), info.dtype())))?;
    Array::from_fill(info.shape(), dtype, |bytes| file.read_into(info, bytes).map_err(file_error(op)))
}

/// Writes arrays to a safetensors file, atomically.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    arrays: &[(String, Array)],
    metadata: &[(&str, &str)],
) -> Result<()> {
    let fail = file_error("save_safetensors");
    safetensors_writer(arrays, metadata)?.write(path).map_err(&fail)
}

/// Arrays as the bytes of a safetensors file.
pub fn safetensors_bytes(arrays: &[(String, Array)], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    safetensors_writer(arrays, metadata)?.to_bytes().map_err(file_error("save_safetensors"))
}

/// A writer of a safetensors file with these arrays, for who wants its errors as `mica-io` tells them.
pub fn safetensors_writer(arrays: &[(String, Array)], metadata: &[(&str, &str)]) -> Result<Writer<'static>> {
    crate::eval(&arrays.iter().map(|(_, array)| array.clone()).collect::<Vec<_>>())?;
    let mut writer = Writer::new();
    for (key, value) in metadata {
        writer.metadata(*key, *value);
    }
    for (name, array) in arrays {
        let array = array.clone();
        let shape = array.shape().to_vec();
        writer.stream(name.clone(), dtype_to_file(array.dtype()), &shape, move |out| {
            array.with_bytes(|bytes| out.write_all(bytes))??;
            Ok(())
        });
    }
    Ok(writer)
}

/// What [`load`] found.
#[derive(Clone, Debug)]
pub enum Loaded {
    /// Of a `.npy` file.
    Array(Array),
    /// Of the other kinds, with their names, in the file's order.
    Arrays(Vec<(String, Array)>),
}

/// Reads a file of the kind that its name's end says: npy, npz, safetensors or gguf.
pub fn load(path: impl AsRef<Path>) -> Result<Loaded> {
    let path = path.as_ref();
    match path.extension().and_then(|end| end.to_str()) {
        Some("npy") => Ok(Loaded::Array(load_npy(path)?)),
        Some("npz") => Ok(Loaded::Arrays(load_npz(path)?)),
        Some("safetensors") => Ok(Loaded::Arrays(load_safetensors(path)?)),
        Some("gguf") => Ok(Loaded::Arrays(load_gguf(path)?.0)),
        _ => Err(Error::invalid(
            "load",
            format!("{} should end in .npy, .npz, .safetensors or .gguf", path.display()),
        )),
    }
}
