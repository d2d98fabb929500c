//! The cases of `algebra.rs` on the reference backend, in a process of their own because the backend is
//! the process's.

use mica_array::backend::reference::Reference;

mod algebra_cases;

#[test]
fn the_definitions_are_those_of_mlx() {
    mica_array::set_backend(Box::new(Reference));
    algebra_cases::check_all("algebra");
    algebra_cases::check_all("algebra_edges");
}
