//! The affine quantizer against `mlx` (fixtures/mlx/quantize.safetensors): every word, scale, bias
//! and dequantized value, bit for bit.

use half::{bf16, f16};
use mica_codec::{Float, QuantSpec, affine};
use mica_testkit::{Golden, fixture};

/// Widened values compare by bits: widening is exact and injective.
fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

fn check<T: Float>(golden: &Golden, dtype: &str) -> usize {
    let read = |name: &str| -> Vec<T> { golden.f32s(name).into_iter().map(T::from_f32).collect() };
    let source = format!("x.{dtype}");
    let columns = golden.shape(&source)[1];
    let values = read(&source);
    let mut cases = 0;
    for bits_per_value in [1, 2, 3, 4, 5, 6, 8] {
        for group in [32, 64, 128] {
            let case = format!("affine.b{bits_per_value}.g{group}.{dtype}");
            let spec = QuantSpec::affine(bits_per_value, group).unwrap();
            let expected = golden.u32s(&format!("{case}.words"));
            let (expected_scales, expected_biases) =
                (read(&format!("{case}.scales")), read(&format!("{case}.biases")));
            let mut words = vec![0; expected.len()];
            let mut scales = vec![T::from_f32(f32::NAN); expected_scales.len()];
            let mut biases = scales.clone();
            affine::quantize(&values, columns, spec, &mut words, &mut scales, &mut biases).unwrap();
            assert_eq!(words, expected, "{case}: words");
            assert_eq!(bits(&scales), bits(&expected_scales), "{case}: scales");
            assert_eq!(bits(&biases), bits(&expected_biases), "{case}: biases");
            let name = format!("{case}.dequantized");
            if golden.contains(&name) {
                let mut back = vec![T::from_f32(f32::NAN); values.len()];
                affine::dequantize(&words, &scales, &biases, columns, spec, &mut back).unwrap();
                assert_eq!(bits(&back), bits(&read(&name)), "{name}");
            }
            cases += 1;
        }
    }
    cases
}

#[test]
fn words_scales_biases_and_dequantized_values_are_those_of_mlx() {
    let golden = Golden::load(fixture("mlx/quantize.safetensors"));
    let cases = check::<f32>(&golden, "f32") + check::<bf16>(&golden, "bf16") + check::<f16>(&golden, "f16");
    let affine =
        golden.names().filter(|name| name.starts_with("affine.") && name.ends_with(".words")).count();
    assert_eq!(cases, affine, "every affine case of the file is checked");
}
