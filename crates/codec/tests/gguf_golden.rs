//! ggml's blocks against the package `gguf` (fixtures/io/gguf_blocks.safetensors).

use mica_codec::gguf::GgufBlock;
use mica_testkit::{Golden, fixture};

#[test]
fn blocks_have_the_values_that_gguf_gives_them() {
    let golden = Golden::load(fixture("io/gguf_blocks.safetensors"));
    for block in GgufBlock::ALL {
        let name = block.name();
        assert_eq!(GgufBlock::from_name(name), Some(block));
        let expected = golden.f32s(&format!("{name}.values"));
        let blocks = golden.bytes(&format!("{name}.blocks"));
        let mut values = vec![f32::NAN; expected.len()];
        block.dequantize(blocks, &mut values).unwrap();
        assert_eq!(values, expected, "{name}");
        assert_eq!(block.first_not_finite(blocks), None, "{name}");
        assert!(block.dequantize(&blocks[1..], &mut values).is_err(), "{name}");
        assert!(block.dequantize(blocks, &mut values[1..]).is_err(), "{name}");
        let mut damaged = blocks.to_vec();
        let (scale, bad) = match block {
            GgufBlock::MXFP4 => (0, vec![0xff]),
            GgufBlock::Q6_K => (208, vec![0x00, 0xfc]),
            _ => (0, vec![0x01, 0x7e]),
        };
        damaged[block.bytes() + scale..][..bad.len()].copy_from_slice(&bad);
        assert_eq!(block.first_not_finite(&damaged), Some(1), "{name}");
    }
    assert_eq!(GgufBlock::from_name("Q4_9"), None);
}
