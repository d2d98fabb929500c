//! What fits in memory, under a limit of the whole process, which is why it has a process to itself.

#![cfg(target_os = "linux")]

use mica_array::{Array, Dtype, memory};
use mica_lm::ErrorKind;
use mica_lm::memory::check;

#[test]
fn memory_that_is_kept_for_reuse_is_given_back_before_anything_is_refused() {
    const BLOCK: u64 = 256 << 20;
    let array = Array::full(&[(BLOCK / 4) as usize], 1.0, Dtype::F32);
    array.eval().unwrap();
    memory::set_process_limit(memory::resident().unwrap() + BLOCK / 4);
    let error = check(BLOCK / 2, "a test", "ask for less").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Memory);
    let text = error.to_string();
    assert!(text.contains("a test needs 0.13 GB more memory") && text.ends_with("ask for less"), "{text}");
    drop(array);
    assert!(memory::cache() as u64 >= BLOCK, "it is kept");
    check(BLOCK / 2, "a test", "ask for less").unwrap();
    check(2 * BLOCK, "a test", "ask for less").unwrap_err();
}
