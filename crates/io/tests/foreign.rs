//! Files written by the programs that define their formats (`fixtures/make/make_io.py`).

use std::fs;
use std::path::Path;

use mica_io::gguf::{Array, BlockType, Gguf, GgufWriter, Value};
use mica_io::npz::Npz;
use mica_io::safetensors::{SafeTensors, Writer};
use mica_io::weights::WeightFiles;
use mica_io::{DType, npy, npz};
use mica_testkit::{Golden, fixture};

fn npy_names() -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(fixture("io")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "npy") {
            names.push(path.file_stem().unwrap().to_str().unwrap().to_owned());
        }
    }
    names.sort();
    assert!(names.len() >= 18, "{names:?}");
    names
}

#[test]
fn a_copy_of_an_official_safetensors_file_has_the_same_bytes() {
    let path = fixture("io/official.safetensors");
    let file = SafeTensors::open(&path).unwrap();
    let data: Vec<_> = file.tensors().iter().map(|t| (t, file.read(t.name()).unwrap())).collect();
    let mut writer = Writer::new();
    for (key, value) in file.metadata() {
        writer.metadata(key, value);
    }
    // Any order of adding gives the same file.
    for (tensor, bytes) in data.iter().rev() {
        writer.tensor(tensor.name(), tensor.dtype(), tensor.shape(), bytes);
    }
    assert_eq!(writer.to_bytes().unwrap(), fs::read(&path).unwrap());
    assert_eq!(file.get("bf16").unwrap().dtype(), DType::BF16);
    assert_eq!(file.get("namé \"quoted\"").unwrap().shape(), [1]);
}

#[test]
fn numpy_arrays_hold_what_safetensors_holds() {
    let official = SafeTensors::open(fixture("io/official.safetensors")).unwrap();
    let expected = Golden::load(fixture("io/expected.safetensors"));
    for name in npy_names() {
        let array = npy::read(fixture(format!("io/{name}.npy"))).unwrap();
        let (shape, bytes) = match name.as_str() {
            "fortran" | "big_endian" => (vec![3, 2, 4], official.read("f8").unwrap()),
            "c8" | "big_endian_c8" => (vec![2], expected.bytes("c8").to_vec()),
            _ => (official.get(&name).unwrap().shape().to_vec(), official.read(&name).unwrap()),
        };
        assert_eq!(array.shape, shape, "{name}");
        assert_eq!(array.bytes, bytes, "{name}");
    }
}

#[test]
fn npy_files_are_byte_for_byte_numpys() {
    for name in npy_names() {
        if name.starts_with("big_endian") || name == "fortran" {
            continue;
        }
        let path = fixture(format!("io/{name}.npy"));
        let array = npy::read(&path).unwrap();
        let mut ours = npy::header(array.dtype, &array.shape).unwrap();
        ours.extend_from_slice(&array.bytes);
        assert_eq!(ours, fs::read(&path).unwrap(), "{name}");
    }
}

#[test]
fn numpy_archives_hold_the_same_arrays() {
    for archive in ["io/stored.npz", "io/deflated.npz"] {
        let file = Npz::open(fixture(archive)).unwrap();
        let mut names: Vec<_> = file.names().filter(|n| *n != "zeros").map(str::to_owned).collect();
        names.sort();
        assert_eq!(names, npy_names(), "{archive}");
        for name in names {
            let array = npy::read(fixture(format!("io/{name}.npy"))).unwrap();
            assert_eq!(file.read(&name).unwrap(), array, "{archive} {name}");
        }
    }
    let zeros = Npz::open(fixture("io/deflated.npz")).unwrap().read("zeros").unwrap();
    assert_eq!((zeros.shape, zeros.bytes), (vec![100, 100], vec![0; 40_000]));
}

#[test]
fn gguf_pys_file_reads_as_written() {
    let file = Gguf::open(fixture("io/small.gguf")).unwrap();
    let values = [
        ("general.architecture", Value::from("llama")),
        ("t.u8", Value::U8(255)),
        ("t.i8", Value::I8(-1)),
        ("t.u16", Value::U16(65535)),
        ("t.i16", Value::I16(-2)),
        ("t.u32", Value::U32(u32::MAX)),
        ("t.i32", Value::I32(-3)),
        ("t.f32", Value::F32(0.5)),
        ("t.bool", Value::Bool(true)),
        ("t.u64", Value::U64(u64::MAX)),
        ("t.i64", Value::I64(i64::MIN)),
        ("t.f64", Value::F64(-0.25)),
        ("t.text", Value::from("é")),
        ("t.texts", Value::from(vec!["a".to_owned(), String::new(), "é".to_owned()])),
        ("t.ints", Value::Array(Array::I32(vec![1, -2, 3]))),
    ];
    let got: Vec<_> = file.metadata().iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    assert_eq!(got, values);
    let expected = Golden::load(fixture("io/expected.safetensors"));
    let cases: [(&str, BlockType, &[usize]); 4] = [
        ("f32", BlockType::F32, &[2, 64]),
        ("f16", BlockType::F16, &[1, 3]),
        ("Q4_0", BlockType::Q4_0, &[2, 64]),
        ("Q8_0", BlockType::Q8_0, &[2, 64]),
    ];
    assert_eq!(file.tensors().len(), cases.len());
    for (name, kind, shape) in cases {
        let tensor = file.require(name).unwrap();
        assert_eq!((tensor.block_type(), tensor.shape()), (kind, shape), "{name}");
        assert_eq!(file.read(name).unwrap(), expected.bytes(name), "{name}");
    }
}

#[test]
fn a_copy_of_gguf_pys_file_has_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy.gguf");
    copy_gguf(&path);
    assert_eq!(fs::read(path).unwrap(), fs::read(fixture("io/small.gguf")).unwrap());
}

fn copy_gguf(path: &Path) {
    let file = Gguf::open(fixture("io/small.gguf")).unwrap();
    let data: Vec<_> = file.tensors().iter().map(|t| (t, file.read(t.name()).unwrap())).collect();
    let mut writer = GgufWriter::new();
    for (key, value) in file.metadata() {
        writer.metadata(key, value.clone());
    }
    for (tensor, bytes) in &data {
        writer.tensor(tensor.name(), tensor.block_type(), tensor.shape(), bytes);
    }
    writer.write(path).unwrap();
}

#[test]
fn the_fixtures_models_open_and_read() {
    let mut sharded = 0;
    for entry in fs::read_dir(fixture("models")).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("config.json").exists() {
            continue;
        }
        let weights = WeightFiles::open(&folder).unwrap_or_else(|e| panic!("{e}"));
        sharded += usize::from(weights.files().len() > 1);
        for file in weights.files() {
            let golden = Golden::load(file.path());
            for tensor in file.tensors() {
                let weight = weights.get(tensor.name()).unwrap();
                assert_eq!(weight.shape(), golden.shape(tensor.name()));
                assert_eq!(weight.read().unwrap(), golden.bytes(tensor.name()), "{}", tensor.name());
            }
        }
    }
    assert!(sharded > 0);
}

/// Leaves copies of all fixtures for `python make_io.py check DIR`.
#[test]
#[ignore = "by hand: MICA_COPIES=DIR, then fixtures/make/make_io.py check DIR"]
fn copies_for_python() {
    let Some(folder) = std::env::var_os("MICA_COPIES") else { return };
    let folder = Path::new(&folder);
    let file = SafeTensors::open(fixture("io/official.safetensors")).unwrap();
    let mut writer = Writer::new();
    writer.metadata("format", "np");
    for tensor in file.tensors() {
        let file = &file;
        writer.stream(tensor.name(), tensor.dtype(), tensor.shape(), move |out| {
            Ok(out.write_all(&file.read(tensor.name())?)?)
        });
    }
    writer.write(folder.join("copy.safetensors")).unwrap();
    copy_gguf(&folder.join("copy.gguf"));
    let arrays: Vec<_> = npy_names()
        .into_iter()
        .map(|name| {
            let array = npy::read(fixture(format!("io/{name}.npy"))).unwrap();
            npy::write(folder.join(format!("{name}.npy")), array.dtype, &array.shape, &array.bytes).unwrap();
            (name, array)
        })
        .collect();
    let arrays: Vec<npz::Named> =
        arrays.iter().map(|(n, a)| (n.as_str(), a.dtype, &a.shape[..], &a.bytes[..])).collect();
    npz::write(folder.join("copy.npz"), &arrays, false).unwrap();
}
