//! Arrays through files of every kind, and what cannot be written or read.

use mica_array::files::{self, GgufValue, Loaded};
use mica_array::quantized::{QuantMode, QuantSpec, QuantizedArray, quantize};
use mica_array::{Array, Complex32, Dtype, Error, PackedWeight, Precision};
use mica_testkit::{Golden, fixture, relative_l2};

fn bytes(array: &Array) -> (Dtype, Vec<usize>, Vec<u8>) {
    (array.dtype(), array.shape().to_vec(), array.with_bytes(<[u8]>::to_vec).unwrap())
}

fn samples() -> Vec<(String, Array)> {
    let f32s = Array::from_slice(&[1.5f32, -2.0, f32::INFINITY, 0.0, 3.25, -0.0], &[2, 3]).unwrap();
    let mut list = vec![
        ("strided".to_string(), f32s.transpose(&[]).unwrap()),
        ("scalar".to_string(), Array::from_slice(&[7i64], &[]).unwrap()),
        ("empty".to_string(), Array::from_slice::<f32>(&[], &[0, 4]).unwrap()),
        ("complex".to_string(), Array::from_slice(&[Complex32 { re: 1.0, im: -2.0 }], &[1]).unwrap()),
    ];
    for dtype in [
        Dtype::Bool,
        Dtype::U8,
        Dtype::U16,
        Dtype::U32,
        Dtype::U64,
        Dtype::I8,
        Dtype::I16,
        Dtype::I32,
        Dtype::F16,
        Dtype::F64,
    ] {
        list.push((
            format!("{dtype}"),
            Array::from_slice(&[0i32, 1, 1], &[3]).unwrap().astype(dtype).unwrap(),
        ));
    }
    list
}

#[test]
fn what_was_saved_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let arrays = samples();
    for (name, array) in &arrays {
        let path = folder.path().join(format!("{name}.npy"));
        files::save_npy(&path, array).unwrap();
        let Loaded::Array(back) = files::load(&path).unwrap() else { panic!("{name}: several arrays") };
        assert_eq!(bytes(&back), bytes(array), "{name}.npy");
    }
    let check = |kind: &str, back: Loaded, arrays: &[(String, Array)]| {
        let Loaded::Arrays(back) = back else { panic!("{kind}: one array") };
        assert_eq!(back.len(), arrays.len(), "{kind}");
        for (name, array) in arrays {
            let (_, found) =
                back.iter().find(|(other, _)| other == name).unwrap_or_else(|| panic!("{kind}: no {name}"));
            assert_eq!(bytes(found), bytes(array), "{kind}: {name}");
        }
    };
    let path = folder.path().join("all.npz");
    files::save_npz(&path, &arrays).unwrap();
    check("npz", files::load(&path).unwrap(), &arrays);
    let path = folder.path().join("small.npz");
    files::save_npz_compressed(&path, &arrays).unwrap();
    check("compressed npz", files::load(&path).unwrap(), &arrays);
    let path = folder.path().join("all.safetensors");
    files::save_safetensors(&path, &arrays, &[("made by", "a test")]).unwrap();
    check("safetensors", files::load(&path).unwrap(), &arrays);
    let known: Vec<(String, Array)> = arrays
        .into_iter()
        .filter(|(name, array)| {
            let signed = array.dtype().is_float() || array.dtype().is_signed_integer();
            signed && name != "empty"
        })
        .collect();
    let path = folder.path().join("all.gguf");
    let metadata =
        vec![("general.name".to_string(), GgufValue::from("a test")), ("n".to_string(), GgufValue::U32(3))];
    files::save_gguf(&path, &known, &metadata).unwrap();
    check("gguf", files::load(&path).unwrap(), &known);
    assert_eq!(files::load_gguf(&path).unwrap().1, metadata);
}

#[test]
fn blocks_of_gguf_become_affine_arrays() {
    use mica_io::gguf::{BlockType, GgufWriter};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks.gguf");
    let scale = half::f16::from_f32(0.5).to_le_bytes();
    let minimum = half::f16::from_f32(-3.0).to_le_bytes();
    // Codes 0..16 in the low nibbles, 15..-1 in the high ones; 64 values are two blocks.
    let nibbles: Vec<u8> = (0..16u8).map(|i| i | (15 - i) << 4).collect();
    let signed: Vec<u8> = (0..32i8).map(|i| (i - 16) as u8).collect();
    let q4_0 = [&scale[..], &nibbles, &scale, &nibbles].concat();
    let q4_1 = [&scale[..], &minimum, &nibbles].concat();
    let q8_0 = [&scale[..], &signed].concat();
    let mut writer = GgufWriter::new();
    writer.tensor("a.weight", BlockType::Q4_0, &[1, 64], &q4_0);
    writer.tensor("b.weight", BlockType::Q4_1, &[1, 32], &q4_1);
    writer.tensor("c.weight", BlockType::Q8_0, &[1, 32], &q8_0);
    writer.write(&path).unwrap();
    let (arrays, _) = files::load_gguf(&path).unwrap();
    let find =
        |name: &str| arrays.iter().find(|(other, _)| other == name).expect("all parts are there").1.clone();
    let codes: Vec<f32> = (0..32).map(|i| if i < 16 { i as f32 } else { (31 - i) as f32 }).collect();
    for (name, bits, expected) in [
        ("a", 4, codes.iter().chain(&codes).map(|c| 0.5 * (c - 8.0)).collect::<Vec<f32>>()),
        ("b", 4, codes.iter().map(|c| 0.5 * c - 3.0).collect()),
        ("c", 8, (0..32).map(|i| 0.5 * (i as f32 - 16.0)).collect()),
    ] {
        let format = QuantSpec::affine(bits, 32).unwrap();
        let parts = ["weight", "scales", "biases"].map(|part| find(&format!("{name}.{part}")));
        let [words, scales, biases] = parts;
        let array = QuantizedArray::new(words, scales, Some(biases), format, None).unwrap();
        let values = array.dequantize(Some(Dtype::F32)).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(values, expected, "{name}");
    }
}

/// Matrices of each kind of block, packed as they are read: the values that the package `gguf` gives them.
#[test]
fn blocks_of_gguf_are_packed_for_products() {
    use mica_io::gguf::{BlockType, GgufWriter};
    let golden = Golden::load(fixture("io/gguf_blocks.safetensors"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks.gguf");
    let names: Vec<&str> = golden.names().filter_map(|name| name.strip_suffix(".blocks")).collect();
    assert!(names.contains(&"Q6_K") && names.contains(&"MXFP4"), "{names:?}");
    let mut damaged = golden.bytes("Q4_0.blocks").to_vec();
    damaged[5 * 18..5 * 18 + 2].copy_from_slice(&[0, 0x7c]);
    let mut writer = GgufWriter::new();
    for name in &names {
        let kind = BlockType::from_name(name).unwrap();
        let block = mica_codec::gguf::GgufBlock::from_name(name).unwrap();
        assert_eq!((kind.block_elements(), kind.block_bytes()), (block.values(), block.bytes()), "{name}");
        let rows = golden.shape(&format!("{name}.blocks"))[0];
        writer.tensor(*name, kind, &[rows, kind.block_elements()], golden.bytes(&format!("{name}.blocks")));
    }
    writer.tensor("damaged", BlockType::Q4_0, &[12, 32], &damaged);
    writer.tensor("floats", BlockType::F32, &[1, 2], &[0, 0, 128, 63, 0, 0, 0, 64]);
    writer.tensor("one", BlockType::F32, &[2], &[0; 8]);
    writer.tensor("other", BlockType::Q2_K, &[1, 256], &[0; 84]);
    writer.write(&path).unwrap();
    let file = files::open_gguf(&path).unwrap();
    for name in names {
        let values = golden.f32s(&format!("{name}.values"));
        let shape = golden.shape(&format!("{name}.values"));
        let weight = Array::from_packed(files::pack_gguf(&file, name).unwrap());
        assert_eq!(weight.shape(), shape, "{name}");
        let x = Array::from_slice(&values[..shape[1]], &[1, shape[1]]).unwrap();
        let expected = x.linear(&Array::from_slice(&values, shape).unwrap(), None, Precision::Exact).unwrap();
        let expected = expected.to_vec::<f32>().unwrap();
        for (precision, bound) in [(Precision::Exact, 1e-6), (Precision::Fast, 0.02)] {
            let y = x.linear(&weight, None, precision).unwrap().to_vec::<f32>().unwrap();
            let error = relative_l2(&y, &expected);
            assert!(error <= bound, "{name}, {precision:?}: {error}");
        }
        // What half precision holds of its numbers, as an array.
        let numbers = weight.dequantize().unwrap().astype(Dtype::F32).unwrap().to_vec::<f32>().unwrap();
        assert!(relative_l2(&numbers, &values) <= 0.004, "{name}");
    }
    let floats = Array::from_packed(files::pack_gguf(&file, "floats").unwrap());
    assert_eq!(floats.dequantize().unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
    for (name, expected) in [
        ("damaged", "blocks.gguf: tensor damaged: block 5 of Q4_0"),
        ("one", "no matrix"),
        ("other", "Q2_K"),
        ("none", "none"),
    ] {
        let error = files::pack_gguf(&file, name).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn what_a_kind_does_not_have_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let bf16 = Array::from_slice(&[1f32], &[1]).unwrap().astype(Dtype::BF16).unwrap();
    let u32s = Array::from_slice(&[1u32], &[1]).unwrap();
    let broken = path("broken.npy");
    std::fs::write(&broken, b"no array").unwrap();
    let cases = [
        ("bf16 in npy", files::save_npy(path("a.npy"), &bf16).unwrap_err(), "bf16"),
        ("u32 in gguf", files::save_gguf(path("a.gguf"), &[("x".into(), u32s)], &[]).unwrap_err(), "uint32"),
        ("another end", files::load(path("a.bin")).unwrap_err(), ".safetensors"),
        ("a broken file", files::load(&broken).unwrap_err(), "broken.npy"),
        ("no file", files::load(path("none.npz")).unwrap_err(), "none.npz"),
    ];
    for (name, error, expected) in cases {
        let text = error.to_string().to_lowercase();
        assert!(text.contains(expected), "{name}: {text}");
    }
    assert!(!path("a.npy").exists(), "nothing is left of what was refused");
}

/// Rows `rows` of these bytes, which are `all` rows.
fn rows_of(bytes: &[u8], all: usize, rows: std::ops::Range<usize>) -> &[u8] {
    let row = bytes.len() / all;
    &bytes[rows.start * row..rows.end * row]
}

#[test]
fn arrays_and_weights_are_read_in_pieces() {
    let shape = [600, 512];
    let values: Vec<f32> = (0..600 * 512).map(|i| (i as f32 * 0.37).sin()).collect();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let array = Array::from_slice(&values, &shape).unwrap().astype(dtype).unwrap();
        let (_, _, content) = bytes(&array);
        for piece in [1 << 12, 100_000, usize::MAX] {
            let read = Array::from_pieces(&shape, dtype, piece, |start, into| {
                into.copy_from_slice(&content[start..][..into.len()]);
                Ok::<(), Error>(())
            });
            assert_eq!(bytes(&read.unwrap()), bytes(&array), "{dtype}, pieces of {piece}");
        }
        let read = PackedWeight::read_float([600, 512], dtype, |rows, into| {
            into.copy_from_slice(rows_of(&content, 600, rows));
            Ok::<(), Error>(())
        });
        let packed = Array::from_packed(read.unwrap());
        assert_eq!(bytes(&packed.dequantize().unwrap()), bytes(&array), "{dtype}, packed");

        for mode in QuantMode::ALL {
            let format = QuantSpec::usual(mode);
            let arrays = |codes: &QuantizedArray| {
                let all = [Some(&codes.words), Some(&codes.scales), codes.biases.as_ref()];
                all.into_iter().flatten().map(bytes).collect::<Vec<_>>()
            };
            let quantized = quantize(&array, format, None).unwrap();
            let parts = arrays(&quantized);
            let scales = quantized.scales.dtype();
            let read = PackedWeight::read_mlx([600, 512], format, scales, |part, rows, into| {
                into.copy_from_slice(rows_of(&parts[part as usize].2, 600, rows));
                Ok::<(), Error>(())
            });
            let back = read.unwrap().to_mlx().unwrap();
            assert_eq!(arrays(&back), parts, "{dtype}, {}", mode.name());
            let packed = Array::from_packed(PackedWeight::from_mlx(&quantized).unwrap());
            let values = packed.dequantize().unwrap();
            let expected = quantized.dequantize(None).unwrap();
            assert_eq!(bytes(&values), bytes(&expected), "{dtype}, values of {}", mode.name());
        }
    }
}

#[test]
fn the_first_piece_that_fails_is_told() {
    let fail = |what: String| Error::Unsupported { op: "test", message: what.into() };
    let error = Array::from_pieces(&[1000], Dtype::F32, 100, |start, _| match start {
        700 | 1600 | 3900 => Err(fail(format!("at {start}"))),
        _ => Ok(()),
    });
    assert!(error.unwrap_err().to_string().contains("at 700"));
    let read = |_, rows: std::ops::Range<usize>, _: &mut [u8]| Err(fail(format!("rows from {}", rows.start)));
    let error = PackedWeight::read_mlx([100_000, 512], QuantSpec::default(), Dtype::BF16, read).unwrap_err();
    assert!(error.to_string().contains("rows from 0"), "{error}");
    for (mode, dtype) in [
        (QuantMode::Affine, Dtype::I32),
        (QuantMode::Affine, Dtype::U8),
        (QuantMode::Mxfp4, Dtype::BF16),
        (QuantMode::Nvfp4, Dtype::F32),
    ] {
        let read = |_, _: std::ops::Range<usize>, _: &mut [u8]| Ok::<(), Error>(());
        let read = PackedWeight::read_mlx([16, 512], QuantSpec::usual(mode), dtype, read);
        assert!(read.is_err(), "{} {dtype}", mode.name());
    }
}
