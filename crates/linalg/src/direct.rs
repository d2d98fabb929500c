//! Decompositions that are a finite number of steps: LU, QR, Cholesky, inverses.
//!
//! Conventions are LAPACK's: partial pivoting by the largest magnitude; reflections that give R's
//! diagonal the sign opposite to the column's, and no reflection of a column that is zero below it.

use crate::Failure;

/// A matrix [n, n] or [m, n] in row-major order, decomposed in place.
pub struct Lu {
    /// L below the diagonal (its ones are not stored), U on and above it.
    pub packed: Vec<f64>,
    /// Per step the row that it was exchanged with.
    pub pivots: Vec<u32>,
    /// Per row of L·U the row of the matrix that it is.
    pub order: Vec<u32>,
    /// Exchanges that moved something.
    pub swaps: usize,
}

/// PA = LU with partial pivoting. A singular matrix has zeros on U's diagonal.
pub fn lu(a: &[f64], m: usize, n: usize) -> Lu {
    let mut packed = a.to_vec();
    let mut order: Vec<u32> = (0..m as u32).collect();
    let (mut pivots, mut swaps) = (Vec::new(), 0);
    for step in 0..m.min(n) {
        let mut best = step;
        for row in step + 1..m {
            if packed[row * n + step].abs() > packed[best * n + step].abs() {
                best = row;
            }
        }
        pivots.push(best as u32);
        if best != step {
            swaps += 1;
            order.swap(best, step);
            let (above, below) = packed.split_at_mut(best * n);
            above[step * n..(step + 1) * n].swap_with_slice(&mut below[..n]);
        }
        let (above, below) = packed.split_at_mut((step + 1) * n);
        let pivot_row = &above[step * n..];
        let pivot = pivot_row[step];
        if pivot == 0.0 {
            continue;
        }
        for row in below.chunks_exact_mut(n) {
            let factor = row[step] / pivot;
            row[step] = factor;
            if factor != 0.0 {
                for (value, &above) in row[step + 1..].iter_mut().zip(&pivot_row[step + 1..]) {
                    *value -= factor * above;
                }
            }
        }
    }
    Lu { packed, pivots, order, swaps }
}

/// The inverse of [n, n].
pub fn inverse(a: &[f64], n: usize) -> Result<Vec<f64>, Failure> {
    let lu = lu(a, n, n);
    if let Some(step) = (0..n).find(|&step| lu.packed[step * n + step] == 0.0) {
        return Err(Failure::Singular(step));
    }
    // Row j of the right-hand side is the unit vector of the row that went there.
    let mut x = vec![0.0; n * n];
    for (row, &from) in lu.order.iter().enumerate() {
        x[row * n + from as usize] = 1.0;
    }
    for row in 0..n {
        for above in 0..row {
            subtract_row(&mut x, n, row, above, lu.packed[row * n + above]);
        }
    }
    for row in (0..n).rev() {
        for below in row + 1..n {
            subtract_row(&mut x, n, row, below, lu.packed[row * n + below]);
        }
        let pivot = lu.packed[row * n + row];
        x[row * n..(row + 1) * n].iter_mut().for_each(|value| *value /= pivot);
    }
    Ok(x)
}

/// row −= factor · other
fn subtract_row(x: &mut [f64], n: usize, row: usize, other: usize, factor: f64) {
    if factor == 0.0 {
        return;
    }
    let (low, high) = x.split_at_mut(row.max(other) * n);
    let (target, source) = if row > other {
        (&mut high[..n], &low[other * n..other * n + n])
    } else {
        (&mut low[row * n..row * n + n], &high[..n])
    };
    for (value, &from) in target.iter_mut().zip(source) {
        *value -= factor * from;
    }
}

/// The inverse of a triangle of [n, n]; the other triangle is not read.
pub fn triangular_inverse(a: &[f64], n: usize, upper: bool) -> Result<Vec<f64>, Failure> {
    let mut x = vec![0.0; n * n];
    let rows: Vec<usize> = if upper { (0..n).rev().collect() } else { (0..n).collect() };
    for row in rows {
        let pivot = a[row * n + row];
        if pivot == 0.0 {
            return Err(Failure::Singular(row));
        }
        x[row * n + row] = 1.0;
        for other in if upper { row + 1..n } else { 0..row } {
            subtract_row(&mut x, n, row, other, a[row * n + other]);
        }
        x[row * n..(row + 1) * n].iter_mut().for_each(|value| *value /= pivot);
    }
    Ok(x)
}

/// L with A = LLᵀ (or its transpose), reading A's lower (upper) triangle.
pub fn cholesky(a: &[f64], n: usize, upper: bool) -> Result<Vec<f64>, Failure> {
    let at = |row: usize, column: usize| if upper { a[column * n + row] } else { a[row * n + column] };
    let mut l = vec![0.0; n * n];
    for row in 0..n {
        for column in 0..=row {
            let (left, right) = (&l[row * n..row * n + column], &l[column * n..column * n + column]);
            let sum: f64 = left.iter().zip(right).map(|(a, b)| a * b).sum();
            let rest = at(row, column) - sum;
            if row > column {
                l[row * n + column] = rest / l[column * n + column];
            } else if rest > 0.0 {
                l[row * n + row] = rest.sqrt();
            } else {
                return Err(Failure::NotPositive(row + 1));
            }
        }
    }
    if upper {
        return Ok((0..n * n).map(|i| l[i % n * n + i / n]).collect());
    }
    Ok(l)
}

/// Q [m, k] and R [k, n] with A = QR, k = min(m, n), by Householder's reflections.
pub fn qr(a: &[f64], m: usize, n: usize) -> (Vec<f64>, Vec<f64>) {
    let k = m.min(n);
    let mut r = a.to_vec();
    // Per column the reflection I − τ v vᵀ, v's first element being 1.
    let mut reflections: Vec<(f64, Vec<f64>)> = Vec::with_capacity(k);
    for step in 0..k {
        let alpha = r[step * n + step];
        let tail = (step + 1..m).map(|row| r[row * n + step].powi(2)).sum::<f64>();
        if tail == 0.0 {
            reflections.push((0.0, Vec::new()));
            continue;
        }
        let beta = -(alpha * alpha + tail).sqrt().copysign(alpha);
        let tau = (beta - alpha) / beta;
        let v: Vec<f64> =
            (step..m).map(|row| if row == step { 1.0 } else { r[row * n + step] / (alpha - beta) }).collect();
        reflect(&mut r, n, step, step, tau, &v);
        for row in step + 1..m {
            r[row * n + step] = 0.0;
        }
        reflections.push((tau, v));
    }
    let mut q = vec![0.0; m * k];
    (0..k).for_each(|i| q[i * k + i] = 1.0);
    for (step, (tau, v)) in reflections.iter().enumerate().rev() {
        reflect(&mut q, k, step, step, *tau, v);
    }
    r.truncate(k * n);
    (q, r)
}

/// Applies I − τ v vᵀ to rows `row ..` and columns `column ..`.
fn reflect(x: &mut [f64], width: usize, row: usize, column: usize, tau: f64, v: &[f64]) {
    if tau == 0.0 {
        return;
    }
    let mut sums = vec![0.0; width - column];
    let lines = x[row * width..].chunks_exact(width);
    for (line, &weight) in lines.zip(v) {
        for (sum, &value) in sums.iter_mut().zip(&line[column..]) {
            *sum += weight * value;
        }
    }
    for (line, &weight) in x[row * width..].chunks_exact_mut(width).zip(v) {
        for (value, &sum) in line[column..].iter_mut().zip(&sums) {
            *value -= tau * weight * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_testkit::Rng;

    fn random(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = Rng::new(seed);
        (0..count).map(|_| rng.normal() as f64).collect()
    }

    fn product(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
        (0..m * n).map(|at| (0..k).map(|p| a[at / n * k + p] * b[p * n + at % n]).sum()).collect()
    }

    #[track_caller]
    fn close(name: &str, a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len(), "{name}");
        for (i, (x, y)) in a.iter().zip(b).enumerate() {
            assert!((x - y).abs() <= 1e-10 * (1.0 + y.abs()), "{name}: element {i} is {x}, expected {y}");
        }
    }

    fn identity(n: usize) -> Vec<f64> {
        (0..n * n).map(|i| (i / n == i % n) as u8 as f64).collect()
    }

    #[test]
    fn factors_multiply_to_the_matrix() {
        for (m, n) in [(1, 1), (4, 4), (7, 3), (3, 7), (33, 33)] {
            let a = random(m * n, (m * 100 + n) as u64);
            let k = m.min(n);
            let (q, r) = qr(&a, m, n);
            close("QR", &product(&q, &r, m, k, n), &a);
            let qt: Vec<f64> = (0..k * m).map(|i| q[i % m * k + i / m]).collect();
            close("QᵀQ", &product(&qt, &q, k, m, k), &identity(k));
            let lu = lu(&a, m, n);
            let l: Vec<f64> = (0..m * k)
                .map(|i| match (i / k).cmp(&(i % k)) {
                    std::cmp::Ordering::Less => 0.0,
                    std::cmp::Ordering::Equal => 1.0,
                    std::cmp::Ordering::Greater => lu.packed[i / k * n + i % k],
                })
                .collect();
            let u: Vec<f64> = (0..k * n).map(|i| if i / n <= i % n { lu.packed[i] } else { 0.0 }).collect();
            let moved: Vec<f64> = (0..m * n).map(|i| a[lu.order[i / n] as usize * n + i % n]).collect();
            close("LU", &product(&l, &u, m, k, n), &moved);
        }
    }

    #[test]
    fn inverses() {
        for n in [1, 2, 5, 20] {
            let a = random(n * n, n as u64);
            close("inverse", &product(&a, &inverse(&a, n).unwrap(), n, n, n), &identity(n));
            let at: Vec<f64> = (0..n * n).map(|i| a[i % n * n + i / n]).collect();
            let mut positive = product(&a, &at, n, n, n);
            (0..n).for_each(|i| positive[i * n + i] += 1.0);
            for upper in [false, true] {
                let factor = cholesky(&positive, n, upper).unwrap();
                let turned: Vec<f64> = (0..n * n).map(|i| factor[i % n * n + i / n]).collect();
                let (l, lt) = if upper { (&turned, &factor) } else { (&factor, &turned) };
                close("Cholesky", &product(l, lt, n, n, n), &positive);
                let back = triangular_inverse(&factor, n, upper).unwrap();
                close("triangle", &product(&factor, &back, n, n, n), &identity(n));
            }
        }
        assert_eq!(inverse(&[1.0, 2.0, 2.0, 4.0], 2), Err(Failure::Singular(1)));
        assert_eq!(cholesky(&[1.0, 2.0, 2.0, 1.0], 2, false), Err(Failure::NotPositive(2)));
    }
}
