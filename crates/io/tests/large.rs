//! Files past 4 GiB. They are sparse: the disk holds only their ends.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use mica_io::gguf::{BlockType, Gguf};
use mica_io::safetensors::SafeTensors;

const LARGE: u64 = 5 << 30;

#[test]
fn safetensors_past_4_gib() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.safetensors");
    let end = LARGE + 4;
    let header = format!(
        r#"{{"large":{{"dtype":"U8","shape":[5,1073741824],"data_offsets":[0,{LARGE}]}},"last":{{"dtype":"U8","shape":[4],"data_offsets":[{LARGE},{end}]}}}}"#
    );
    let file = File::create(&path).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(header.as_bytes(), 8).unwrap();
    let data = 8 + header.len() as u64;
    file.write_all_at(b"tail", data + LARGE).unwrap();
    file.write_all_at(b"edge", data + LARGE - 4).unwrap();

    let file = SafeTensors::open(&path).unwrap();
    assert_eq!(file.read("last").unwrap(), b"tail");
    let mut out = [0; 6];
    file.read_range(file.get("large").unwrap(), LARGE as usize - 6, &mut out).unwrap();
    assert_eq!(&out, b"\0\0edge");
}

#[test]
fn gguf_past_4_gib() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut header = b"GGUF\x03\0\0\0".to_vec();
    let mut put = |values: &[u64]| values.iter().for_each(|v| header.extend_from_slice(&v.to_le_bytes()));
    // Two tensors, no metadata.
    put(&[2, 0]);
    for (name, len, offset) in [(b'a', LARGE, 0), (b'b', 4, LARGE)] {
        header.extend_from_slice(&1u64.to_le_bytes());
        header.push(name);
        header.extend_from_slice(&1u32.to_le_bytes());
        header.extend_from_slice(&len.to_le_bytes());
        header.extend_from_slice(&BlockType::I8.number().to_le_bytes());
        header.extend_from_slice(&offset.to_le_bytes());
    }
    header.resize(header.len().next_multiple_of(32), 0);
    let file = File::create(&path).unwrap();
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(b"tail", header.len() as u64 + LARGE).unwrap();

    let file = Gguf::open(&path).unwrap();
    assert_eq!(file.read("b").unwrap(), b"tail");
    assert_eq!(file.get("a").unwrap().byte_len() as u64, LARGE);
}
