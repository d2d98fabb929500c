//! GGUF files of strangers: malformed in every way known from other programs, and real ones.

use std::fs;
use std::path::PathBuf;

use mica_io::gguf::{Array, BlockType, Gguf, GgufWriter, Value};
use mica_io::{Error, ErrorKind};
use mica_testkit::{Rng, shared};

/// Builds files byte by byte, wrong ones too.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn file(version: u32, tensors: u64, metadata: u64) -> Bytes {
        Bytes(b"GGUF".to_vec()).u32(version).u64(tensors).u64(metadata)
    }

    fn u32(mut self, v: u32) -> Bytes {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }

    fn u64(mut self, v: u64) -> Bytes {
        self.0.extend_from_slice(&v.to_le_bytes());
        self
    }

    fn text(mut self, v: &str) -> Bytes {
        self = self.u64(v.len() as u64);
        self.raw(v.as_bytes())
    }

    fn raw(mut self, v: &[u8]) -> Bytes {
        self.0.extend_from_slice(v);
        self
    }

    /// An entry for a tensor; `shape` has the fastest dimension first, as in files.
    fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Bytes {
        let start = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(start, |b, &d| b.u64(d)).u32(kind).u64(offset)
    }

    /// Padding to the alignment, then so many bytes of data.
    fn data(mut self, len: usize) -> Bytes {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + len, 7);
        self
    }
}

fn open(content: &[u8]) -> Result<Gguf, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, content).unwrap();
    // The file stays readable through its handle.
    Gguf::open(path)
}

#[test]
fn accepted_files() {
    const I8: u32 = 24;
    let cases = [
        ("version 2", Bytes::file(2, 0, 0)),
        ("metadata and no padding", Bytes::file(3, 0, 1).text("a").u32(0).raw(&[1])),
        ("any order", Bytes::file(3, 2, 0).tensor("a", &[4], I8, 32).tensor("b", &[32], I8, 0).data(36)),
        ("empty tensor", Bytes::file(3, 2, 0).tensor("a", &[0], I8, 0).tensor("b", &[3], I8, 0).data(3)),
        ("no dimension", Bytes::file(3, 1, 0).tensor("a", &[], I8, 0).data(1)),
        ("padding at the end", Bytes::file(3, 1, 0).tensor("a", &[3], I8, 0).data(32)),
        (
            "own alignment",
            Bytes::file(3, 1, 1).text("general.alignment").u32(4).u32(64).tensor("a", &[3], I8, 0).data(67),
        ),
    ];
    for (name, Bytes(content)) in cases {
        let file = open(&content).unwrap_or_else(|e| panic!("{name}: {e}"));
        for tensor in file.tensors() {
            let bytes = file.read(tensor.name()).unwrap();
            assert_eq!(bytes, vec![7; tensor.byte_len()], "{name}");
        }
    }
    let Bytes(content) = Bytes::file(3, 1, 0).tensor("a", &[32, 3, 2], 8, 0).data(6 * 34);
    let file = open(&content).unwrap();
    let a = file.get("a").unwrap();
    assert_eq!((a.block_type(), a.shape(), a.byte_len()), (BlockType::Q8_0, &[2, 3, 32][..], 204));
}

#[test]
fn refused_files() {
    const I8: u32 = 24;
    const Q8_0: u32 = 8;
    let file = Bytes::file;
    let nested = |levels: usize| (0..levels).fold(file(3, 0, 1).text("a").u32(9), |b, _| b.u32(9).u64(1));
    let alignment = |v: u32| file(3, 0, 1).text("general.alignment").u32(4).u32(v);
    let half = 1u64 << 63;
    // Name, content, part of the message.
    let cases: &[(&str, Bytes, &str)] = &[
        ("empty", Bytes(vec![]), "ends after"),
        ("another file", Bytes(b"PK\x03\x04 and more".to_vec()), "does not begin like"),
        ("magic only", Bytes(b"GGUF".to_vec()), "ends after"),
        ("version 1", file(1, 0, 0), "version 1"),
        ("version 4", file(4, 0, 0), "version 4"),
        ("big-endian", file(3u32.swap_bytes(), 0, 0), "big-endian"),
        ("more entries than bytes", file(3, 0, u64::MAX), "do not fit"),
        ("more tensors than bytes", file(3, u64::MAX, 0), "do not fit"),
        ("count that overflows", file(3, half, half), "do not fit"),
        ("metadata cut", file(3, 0, 1).text("a").u32(4).raw(&[0]), "ends after"),
        ("key beyond the file", file(3, 0, 1).u64(u64::MAX).raw(&[0; 20]), "ends after"),
        ("key not UTF-8", file(3, 0, 1).u64(1).raw(&[0xff]).u32(0).raw(&[0]), "UTF-8"),
        ("text beyond the file", file(3, 0, 1).text("a").u32(8).u64(half).raw(&[0; 9]), "ends after"),
        ("unknown type", file(3, 0, 1).text("a").u32(13).u64(0), "unknown type 13"),
        ("truth value 2", file(3, 0, 1).text("a").u32(7).raw(&[2]), "neither 0 nor 1"),
        ("equal keys", file(3, 0, 2).text("a").u32(0).raw(&[1]).text("a").u32(0).raw(&[1]), "occurs twice"),
        ("long key", file(3, 0, 1).text(&"k".repeat(65_536)).u32(0).raw(&[1]), "65536"),
        ("array of unknown type", file(3, 0, 1).text("a").u32(9).u32(99).u64(0), "unknown type 99"),
        ("numbers that overflow", file(3, 0, 1).text("a").u32(9).u32(12).u64(1 << 61), "do not fit"),
        ("texts past the end", file(3, 0, 1).text("a").u32(9).u32(8).u64(1 << 40), "do not fit"),
        ("texts that overflow", file(3, 0, 1).text("a").u32(9).u32(8).u64(1 << 61), "do not fit"),
        ("deep arrays", nested(100_000), "deeper than"),
        ("alignment 0", alignment(0), "power of two"),
        ("alignment 48", alignment(48), "power of two"),
        ("alignment of 2 GiB", alignment(1 << 31), "power of two"),
        ("alignment is a text", file(3, 0, 1).text("general.alignment").text("8"), ""),
        ("unknown tensor type", file(3, 1, 0).tensor("a", &[1], 4, 0).data(4), "unknown type 4"),
        ("five dimensions", file(3, 1, 0).tensor("a", &[1; 5], I8, 0).data(1), "5 dimensions"),
        ("2^32 - 1 dimensions", file(3, 1, 0).text("a").u32(u32::MAX).raw(&[0; 64]), "dimensions"),
        ("part of a block", file(3, 1, 0).tensor("a", &[33], Q8_0, 0).data(100), "blocks of 32"),
        ("size that overflows", file(3, 1, 0).tensor("a", &[1 << 32, 1 << 32], I8, 0).data(1), "no possible"),
        ("bytes that overflow", file(3, 1, 0).tensor("a", &[half], 0, 0).data(1), "no possible"),
        ("overflow behind zero", file(3, 1, 0).tensor("a", &[half, 0, 4], I8, 0).data(1), "no possible"),
        ("offset not aligned", file(3, 1, 0).tensor("a", &[1], I8, 1).data(2), "no multiple of 32"),
        (
            "end that overflows",
            file(3, 1, 0).tensor("a", &[64], I8, u64::MAX - 31).data(2),
            "leaves the file",
        ),
        ("data past the end", file(3, 1, 0).tensor("a", &[4], I8, 0).data(3), "leaves the file"),
        ("no data at all", Bytes(file(3, 1, 0).tensor("a", &[4], I8, 0).0), "leaves the file"),
        ("offset past the end", file(3, 1, 0).tensor("a", &[4], I8, 1 << 40).data(4), "leaves the file"),
        (
            "equal names",
            file(3, 2, 0).tensor("a", &[4], I8, 0).tensor("a", &[4], I8, 32).data(64),
            "occurs twice",
        ),
        (
            "overlap",
            file(3, 2, 0).tensor("a", &[33], I8, 0).tensor("b", &[4], I8, 32).data(64),
            "\"a\" and \"b\" overlap",
        ),
        ("same bytes", file(3, 2, 0).tensor("a", &[4], I8, 0).tensor("b", &[4], I8, 0).data(64), "overlap"),
        ("hole", file(3, 2, 0).tensor("a", &[4], I8, 0).tensor("b", &[4], I8, 64).data(96), "hole of 60"),
        ("hole at the start", file(3, 1, 0).tensor("a", &[4], I8, 32).data(64), "hole of 32"),
    ];
    for (name, Bytes(content), message) in cases {
        let error = open(content).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::BadData, "{name}: {error}");
        assert!(error.to_string().contains(message), "{name}: {error}");
    }
}

#[test]
fn damaged_files_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("m.gguf");
    let mut writer = GgufWriter::new();
    writer
        .metadata("general.architecture", "llama")
        .metadata("tokens", vec!["a".to_owned(), "b".to_owned()])
        .metadata("scores", vec![1.0f32; 3])
        .metadata("nested", Value::Array(Array::Array(vec![Array::Bool(vec![true])])))
        .tensor("a", BlockType::Q4_0, &[2, 32], &[1; 36])
        .tensor("b", BlockType::F32, &[2, 2], &[2; 16]);
    writer.write(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut rng = Rng::new(5);
    let mut opened = 0;
    for round in 0..4000 {
        let mut content = whole.clone();
        if round < whole.len() {
            content.truncate(round);
        } else {
            for _ in 0..rng.range(1..4) {
                let at = rng.range(0..content.len());
                content[at] = *rng.choose(&[0, 1, 2, 8, 9, 32, 127, 128, 255, rng.clone().u32() as u8]);
            }
        }
        // Truncating a file makes some file systems write it out at once; a new one does not.
        fs::remove_file(&path).unwrap();
        fs::write(&path, &content).unwrap();
        if let Ok(file) = Gguf::open(&path) {
            opened += 1;
            for tensor in file.tensors() {
                assert_eq!(file.read(tensor.name()).unwrap().len(), tensor.byte_len());
            }
        }
    }
    assert!(opened > 100, "only {opened} files were still well-formed: the test looks at too little");
}

/// llama.cpp's own vocabulary files.
#[test]
fn real_vocabularies_open() {
    let Some(folder) = shared("data/vocab") else { return };
    let cases = [("ggml-vocab-llama-spm.gguf", "llama", 32_000), ("ggml-vocab-gpt-2.gguf", "gpt2", 50_257)];
    for (name, architecture, tokens) in cases {
        let file = Gguf::open(folder.join(name)).unwrap();
        assert_eq!(file.text("general.architecture").unwrap(), Some(architecture), "{name}");
        assert_eq!(file.texts("tokenizer.ggml.tokens").unwrap().unwrap().len(), tokens, "{name}");
    }
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "gguf") {
            Gguf::open(&path).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
