//! The micro-scaled formats against `mlx` (fixtures/mlx/quantize.safetensors): every word, scale and
//! dequantized value, bit for bit.

use half::{bf16, f16};
use mica_codec::Float;
use mica_codec::micro::{self, MicroMode};
use mica_testkit::{Golden, fixture};

fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

fn check<T: Float>(golden: &Golden, case: &str, source: &str, mode: MicroMode, global: Option<f32>) {
    let read = |name: &str| -> Vec<T> { golden.f32s(name).into_iter().map(T::from_f32).collect() };
    let values = read(source);
    let expected = golden.u32s(&format!("{case}.words"));
    let mut words = vec![0; expected.len()];
    let mut scales = vec![0; values.len() / mode.group_size()];
    micro::quantize(&values, mode, global, &mut words, &mut scales).unwrap();
    assert_eq!(scales, golden.bytes(&format!("{case}.scales")), "{case}: scales");
    assert_eq!(words, expected, "{case}: words");
    let mut back = vec![T::from_f32(f32::NAN); values.len()];
    micro::dequantize(&words, &scales, mode, global, &mut back).unwrap();
    assert_eq!(bits(&back), bits(&read(&format!("{case}.dequantized"))), "{case}: values");
}

#[test]
fn words_scales_and_values_are_those_of_mlx() {
    let golden = Golden::load(fixture("mlx/quantize.safetensors"));
    for mode in [MicroMode::Mxfp4, MicroMode::Mxfp8, MicroMode::Nvfp4] {
        let case = |dtype: &str| format!("{}.b{}.g{}.{dtype}", mode.name(), mode.bits(), mode.group_size());
        check::<f32>(&golden, &case("f32"), "x.f32", mode, None);
        check::<bf16>(&golden, &case("bf16"), "x.bf16", mode, None);
        check::<f16>(&golden, &case("f16"), "x.f16", mode, None);
    }
    let case = "nvfp4_global.b4.g16.f32";
    let global = golden.f32s(&format!("{case}.global_scale"))[0];
    check::<f32>(&golden, case, &format!("{case}.x"), MicroMode::Nvfp4, Some(global));
}
