//! The cases of tests/goldens on the reference backend, so that the definition of every op is held to
//! MLX too. The backend is the process's, so this file has one test.

use mica_array::backend::reference::Reference;
use mica_array::set_backend;

#[path = "goldens/call.rs"]
mod call;
#[path = "goldens/cases.rs"]
mod cases;
#[path = "goldens/compare.rs"]
mod compare;

#[test]
fn the_reference_gives_what_mlx_gives() {
    set_backend(Box::new(Reference));
    cases::check_all("array");
    cases::check_all("edges");
}
