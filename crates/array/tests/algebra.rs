//! Products, convolutions, Fourier transforms, linear algebra, quantized arrays, fused functions and
//! complex numbers against `mlx`, on the CPU backend.

mod algebra_cases;

#[test]
fn functions_are_those_of_mlx() {
    algebra_cases::check_all();
}
