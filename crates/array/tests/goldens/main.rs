//! What `mlx.core` gives, for every function of elements, indices, shapes and order: the cases of
//! fixtures/mlx/array.json (fixtures/make/make_array.py made them).

mod call;
mod cases;
mod compare;
mod promotion;

#[test]
fn every_case_gives_what_mlx_gives() {
    cases::check_all();
}
