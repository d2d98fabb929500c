//! Limits and rehearsals. One test, because both are of the whole process.

use mica_array::kv::{KvCache, KvFormat, KvSpec, PagedSpec};
use mica_array::transforms::grad;
use mica_array::{Array, Dtype, Error, Precision, eval, memory};

/// A chain of products of growing sizes, of which every intermediate dies.
fn chain() -> mica_array::Result<Array> {
    let mut x = Array::arange(0.0, 64.0 * 1024.0, 1.0, Dtype::F32)?.reshape(&[64, 1024])?.multiply(1e-4)?;
    for i in 0..24i64 {
        let wide = 1024 + 96 * i;
        let ones = Array::ones(&[x.dim(-1), wide as usize], Dtype::F32).multiply(1e-3)?;
        x = x.matmul(&ones)?.tanh()?;
    }
    Ok(x)
}

/// A prompt through eight layers that attend over pages, with 1 MiB of queries each.
fn attending() -> mica_array::Result<()> {
    let kv = KvSpec { layers: 8, kv_heads: 1, head_dim: 64, format: KvFormat::F32 };
    let spec = PagedSpec { scale: 1.0, window: None, softcap: None, precision: Precision::Exact };
    let mut cache = KvCache::new(kv, 1);
    cache.reserve(256)?;
    let mut x = Array::zeros(&[1, 256, 16, 64], Dtype::F32).add(1.0)?;
    for layer in 0..8 {
        let kv = x.narrow(2, 0, 1)?;
        x = cache.attend(layer, &x, &kv, &kv, spec)?.add(1.0)?;
    }
    eval(&cache.pending())
}

#[test]
fn limits_are_kept_and_rehearsals_are_right() {
    // Room for pools and tables.
    chain().unwrap().eval().unwrap();
    let expected = chain().unwrap().to_vec::<f32>().unwrap();
    memory::clear_cache();

    // A rehearsal computes nothing and says what computing takes.
    let before = (memory::active(), memory::cache());
    let (array, rehearsal) = memory::rehearse(|| {
        let array = chain().unwrap();
        array.eval().unwrap();
        array
    });
    assert_eq!((memory::active(), memory::cache()), before, "no memory was taken");
    let error = array.to_vec::<f32>().unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "reading: {error}");
    let error = array.add(1.0).unwrap().eval().unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "computing: {error}");
    drop(array);
    memory::clear_cache();
    memory::reset_peak();
    let array = chain().unwrap();
    array.eval().unwrap();
    let held = (memory::active() - before.0 + memory::cache()) as u64;
    assert!(
        rehearsal.bytes >= held && rehearsal.bytes < held + held / 8 + (8 << 20),
        "{rehearsal:?}, {held}"
    );
    assert_eq!(array.to_vec::<f32>().unwrap(), expected, "the real thing is not disturbed");
    drop(array);

    // What a layer attended is given back when the next has read it, though its token is kept.
    let (result, prompt) = memory::rehearse(attending);
    result.unwrap();
    assert!(prompt.bytes < 4 << 20, "{prompt:?}");

    // Of arrays that gradients take as bf16, no more is kept.
    let needs = |dtype: Dtype| {
        let (grads, rehearsal) = memory::rehearse(|| {
            let x = Array::full(&[256, 1024], 1.0, Dtype::F32).contiguous()?;
            let squares = |x: &[Array]| {
                let mut x = x[0].clone();
                for _ in 0..16 {
                    // A view of what is saved is saved.
                    let flat = x.saved_as(dtype)?.reshape(&[-1])?.saved_as(dtype)?;
                    x = flat.reshape(&[512, 512])?.square()?.reshape(&[256, 1024])?;
                }
                x.sum(&[], false)
            };
            let grads = grad(squares, &[x])?;
            eval(&grads)?;
            Ok::<_, Error>(grads)
        });
        grads.unwrap();
        rehearsal.bytes >> 20
    };
    let (wide, narrow) = (needs(Dtype::F32), needs(Dtype::BF16));
    assert!((16..21).contains(&wide) && narrow < 13, "{wide} and {narrow} MiB");

    // With less memory than that everything is computed as well, in more plans.
    memory::clear_cache();
    let largest = 1024 * 3200 * 4;
    let limit = memory::active() + 5 * largest;
    assert!((limit as u64) < rehearsal.bytes, "{limit} {rehearsal:?}");
    let former = memory::set_limit(limit);
    let array = chain().unwrap();
    array.eval().unwrap();
    assert_eq!(array.to_vec::<f32>().unwrap(), expected);
    assert!(memory::active() + memory::cache() <= limit);

    // With too little it is an error, and afterwards all is as before.
    memory::set_limit(memory::active() + largest / 4);
    let error = chain().unwrap().eval().unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    memory::set_limit(former);
    assert_eq!(chain().unwrap().to_vec::<f32>().unwrap(), expected);
    eval(&[]).unwrap();

    // Small plans do not make memory go that the next large one will want.
    memory::clear_cache();
    chain().and_then(|array| array.eval()).expect("there is memory");
    let kept = memory::cache();
    for _ in 0..200 {
        Array::zeros(&[64], Dtype::F32).add(1.0).and_then(|array| array.eval()).expect("there is memory");
    }
    assert!(kept > 1 << 20 && memory::cache() > kept / 10 * 9, "{kept} bytes became {}", memory::cache());
}
