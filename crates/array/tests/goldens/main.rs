//! What `mlx.core` gives, for every function of elements, indices, shapes and order: the cases of
//! fixtures/mlx/array.json (made by fixtures/make/make_array.py), and of edges.json (make_edges.py): every function over
//! every dtype in every edge shape.

mod call;
mod cases;
mod compare;
mod promotion;

#[test]
fn every_case_gives_what_mlx_gives() {
    cases::check_all("array");
}

#[test]
fn every_edge_of_every_dtype_gives_what_mlx_gives() {
    cases::check_all("edges");
}
