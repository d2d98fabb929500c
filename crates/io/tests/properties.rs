//! Random files: what is written reads back, and what is damaged never panics.

use std::fs;
use std::path::Path;

use mica_io::jsonl::Lines;
use mica_io::safetensors::{SafeTensors, Writer};
use mica_io::weights::{ShardedWriter, WeightFiles};
use mica_io::{DType, npy};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// A tensor: type, shape, and a byte that its content begins with.
type Case = (DType, Vec<usize>, u8);

fn case() -> impl Strategy<Value = Case> {
    let dtypes: Vec<DType> = DType::all().filter(|d| d.size().is_some()).collect();
    (prop::sample::select(dtypes), vec(0usize..5, 0..4), any::<u8>())
}

fn bytes((dtype, shape, first): &Case) -> Vec<u8> {
    (0..dtype.bytes_of(shape).unwrap()).map(|i| first.wrapping_add(i as u8)).collect()
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z.0-9]{1,12}", "\\PC{0,6}", Just("\"\\\n\u{1}\u{1F600}".to_owned())]
        .prop_filter("reserved", |name| name != "__metadata__")
}

/// Opens a possibly damaged file: whatever opens must also read, to the length it promised.
fn survives(path: &Path) {
    if let Ok(file) = SafeTensors::open(path) {
        for tensor in file.tensors() {
            let bytes = file.read(tensor.name()).expect("the header was checked against the file");
            assert_eq!(bytes.len(), tensor.byte_len());
            assert_eq!(tensor.dtype().bytes_of(tensor.shape()), Some(bytes.len()));
        }
    }
}

/// One way to damage a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    // Bytes that mean something in a header, besides any.
    let byte = prop_oneof![any::<u8>(), prop::sample::select(&b"0123456789{}[]\",:-.eE\\ "[..])];
    prop_oneof![
        4 => (any::<prop::sample::Index>(), byte.clone()).prop_map(|(i, b)| Damage::Flip(i, b)),
        1 => any::<prop::sample::Index>().prop_map(Damage::Cut),
        1 => (any::<prop::sample::Index>(), vec(byte, 1..5)).prop_map(|(i, b)| Damage::Insert(i, b)),
        1 => (any::<prop::sample::Index>(), 1usize..20).prop_map(|(i, n)| Damage::Remove(i, n)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    if bytes.is_empty() {
        return;
    }
    match damage {
        Damage::Flip(i, byte) => {
            let i = i.index(bytes.len());
            bytes[i] = *byte;
        }
        Damage::Cut(i) => bytes.truncate(i.index(bytes.len())),
        Damage::Insert(i, extra) => {
            let i = i.index(bytes.len());
            bytes.splice(i..i, extra.iter().copied());
        }
        Damage::Remove(i, n) => {
            let i = i.index(bytes.len());
            bytes.drain(i..bytes.len().min(i + n));
        }
    }
}

proptest! {
    #[test]
    fn safetensors_round_trip(tensors in btree_map(names(), case(), 0..8), metadata in btree_map(".{0,5}", ".{0,5}", 0..3)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let data: Vec<Vec<u8>> = tensors.values().map(bytes).collect();
        let write = |reverse: bool| {
            let mut writer = Writer::new();
            for (key, value) in &metadata {
                writer.metadata(key, value);
            }
            let mut entries: Vec<_> = tensors.iter().zip(&data).collect();
            if reverse {
                entries.reverse();
            }
            for ((name, (dtype, shape, _)), bytes) in entries {
                writer.tensor(name, *dtype, shape, bytes);
            }
            writer
        };
        write(false).write(&path).unwrap();
        prop_assert_eq!(&fs::read(&path).unwrap(), &write(true).to_bytes().unwrap());

        let file = SafeTensors::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for ((name, (dtype, shape, _)), bytes) in tensors.iter().zip(&data) {
            let info = file.get(name).unwrap();
            prop_assert_eq!(info.dtype(), *dtype);
            prop_assert_eq!(info.shape(), &shape[..]);
            prop_assert_eq!(&file.read(name).unwrap(), bytes);
            for at in [0, bytes.len() / 2, bytes.len()] {
                let mut part = vec![0; bytes.len() - at];
                file.read_range(info, at, &mut part).unwrap();
                prop_assert_eq!(&part[..], &bytes[at..]);
            }
        }
    }

    #[test]
    fn damaged_safetensors_never_panic(tensors in btree_map(names(), case(), 1..5), damages in vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let data: Vec<Vec<u8>> = tensors.values().map(bytes).collect();
        let mut writer = Writer::new();
        for ((name, (dtype, shape, _)), bytes) in tensors.iter().zip(&data) {
            writer.tensor(name, *dtype, shape, bytes);
        }
        let mut file = writer.to_bytes().unwrap();
        for damage in &damages {
            apply(&mut file, damage);
        }
        fs::write(&path, file).unwrap();
        survives(&path);
    }

    #[test]
    fn made_up_headers_never_panic(
        pieces in vec(prop::sample::select(&[
            "{", "}", "[", "]", ":", ",", "\"a\"", "\"b\"", "\"dtype\"", "\"shape\"", "\"data_offsets\"",
            "\"F32\"", "\"U8\"", "\"__metadata__\"", "0", "1", "4", "18446744073709551615",
            "9223372036854775808", "-1", "1e400", "null", "true",
            "{\"a\":{\"dtype\":\"U8\",\"shape\":[", "],\"data_offsets\":[0,", "]}}",
        ][..]), 0..12),
        data in 0usize..10,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let text = pieces.concat();
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(text.as_bytes());
        file.resize(file.len() + data, 0);
        fs::write(&path, file).unwrap();
        survives(&path);
    }

    #[test]
    fn sharded_folders_round_trip(tensors in btree_map(names(), case(), 0..8), bound in 0u64..200) {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<Vec<u8>> = tensors.values().map(bytes).collect();
        let mut writer = ShardedWriter::new();
        writer.max_shard_bytes(bound);
        for ((name, (dtype, shape, _)), bytes) in tensors.iter().zip(&data) {
            writer.tensor(name, *dtype, shape, bytes);
        }
        writer.write(folder.path()).unwrap();
        let weights = WeightFiles::open(folder.path()).unwrap();
        prop_assert_eq!(weights.len(), tensors.len());
        for (weight, ((name, (dtype, shape, _)), bytes)) in weights.iter().zip(tensors.iter().zip(&data)) {
            prop_assert_eq!(weight.name(), name);
            prop_assert_eq!(weight.dtype(), *dtype);
            prop_assert_eq!(weight.shape(), &shape[..]);
            prop_assert_eq!(&weight.read().unwrap(), bytes);
        }
        for file in weights.files() {
            let total: u64 = file.tensors().iter().map(|t| t.byte_len() as u64).sum();
            let filled = file.tensors().iter().filter(|t| t.byte_len() > 0).count();
            prop_assert!(total <= bound || filled == 1);
        }
    }

    #[test]
    fn damaged_npy_never_panics(shape in vec(0usize..5, 0..4), damages in vec(damage(), 1..4)) {
        let mut file = npy::header(DType::F32, &shape).unwrap();
        file.resize(file.len() + DType::F32.bytes_of(&shape).unwrap(), 1);
        for damage in &damages {
            apply(&mut file, damage);
        }
        if let Ok(array) = npy::parse(&file) {
            prop_assert_eq!(array.dtype.bytes_of(&array.shape), Some(array.bytes.len()));
        }
    }

    #[test]
    fn lines_of_any_bytes_keep_their_places(content in vec(prop::sample::select(&b"ab \r\n\n\xc3\xa9\xff"[..]), 0..60), limit in 1usize..10) {
        let lines = Lines::new("f", &content[..]).limit(limit);
        let mut last = 0;
        for line in lines.flatten() {
            prop_assert!(line.number > last);
            last = line.number;
            let start = line.offset as usize;
            prop_assert_eq!(&content[start..start + line.text.len()], line.text.as_bytes());
            prop_assert!(line.text.len() <= limit);
            let before = content[..start].iter().filter(|&&b| b == b'\n').count();
            prop_assert_eq!(line.number, before + 1);
        }
    }
}
