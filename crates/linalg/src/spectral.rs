//! Eigenvalues and singular values.
//!
//! Hermitian matrices are brought to tridiagonal form by reflections, then diagonal by implicit QL steps.
//! Singular vectors start from the eigenvectors of AᴴA, which are good but for small values, and are
//! finished by one-sided Jacobi rotations, which make every column orthogonal to working accuracy. Other
//! matrices go through Hessenberg form and shifted QR steps to Schur's, in complex numbers throughout.

use num_complex::Complex64;

use crate::Failure;
use crate::field::{Field, dot, norm_sqr, reflection};

/// U [m, m] (row-major), the min(m, n) singular values in descending order, and Vᴴ [n, n].
pub struct Svd<T> {
    /// Left vectors, as columns.
    pub u: Vec<T>,
    /// Singular values.
    pub s: Vec<f64>,
    /// Right vectors, conjugated, as rows.
    pub vt: Vec<T>,
}

/// Eigenvalues, and vectors as the columns of a row-major [n, n].
pub struct Eigen<V, T> {
    /// Eigenvalues.
    pub values: Vec<V>,
    /// Eigenvectors of norm 1.
    pub vectors: Vec<T>,
}

/// Steps per eigenvalue, or sweeps over all columns, that are more than enough.
const PATIENCE: usize = 60;

/// The singular value decomposition of a real [m, n].
pub fn svd_real(a: &[f64], m: usize, n: usize) -> Result<Svd<f64>, Failure> {
    svd(a, m, n)
}

/// The singular value decomposition of a complex [m, n].
pub fn svd_complex(a: &[Complex64], m: usize, n: usize) -> Result<Svd<Complex64>, Failure> {
    svd(a, m, n)
}

/// Eigenvalues (ascending) and vectors of a symmetric matrix, of which one triangle is read.
pub fn eigh_real(a: &[f64], n: usize, upper: bool) -> Result<Eigen<f64, f64>, Failure> {
    eigh(a, n, upper)
}

/// Eigenvalues (ascending) and vectors of a Hermitian matrix, of which one triangle is read.
pub fn eigh_complex(a: &[Complex64], n: usize, upper: bool) -> Result<Eigen<f64, Complex64>, Failure> {
    eigh(a, n, upper)
}

fn eigh<T: Field>(a: &[T], n: usize, upper: bool) -> Result<Eigen<f64, T>, Failure> {
    // Both triangles, from the one that counts.
    let mut full: Vec<T> = (0..n * n)
        .map(|at| {
            let (i, j) = (at / n, at % n);
            match i == j {
                true => T::of(a[at].re()),
                false if (i > j) != upper => a[at],
                false => a[j * n + i].conj(),
            }
        })
        .collect();
    let (values, rows) = hermitian(&mut full, n)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    Ok(Eigen {
        values: order.iter().map(|&i| values[i]).collect(),
        vectors: (0..n * n).map(|at| rows[order[at % n] * n + at / n]).collect(),
    })
}

/// Eigenvalues in no order, and vectors as rows, of a full Hermitian matrix, which is used up.
fn hermitian<T: Field>(a: &mut [T], n: usize) -> Result<(Vec<f64>, Vec<T>), Failure> {
    if a.iter().any(|value| !value.is_finite()) {
        return Err(Failure::NoConvergence);
    }
    // Row j of `rows` is column j of Q.
    let mut rows = vec![T::of(0.0); n * n];
    (0..n).for_each(|i| rows[i * n + i] = T::of(1.0));
    let mut off = vec![0.0; n];
    for k in 0..n.saturating_sub(1) {
        let mut v: Vec<T> = (k + 1..n).map(|i| a[i * n + k]).collect();
        let Some((beta, tau)) = reflection(&mut v) else {
            off[k] = v[0].re();
            continue;
        };
        off[k] = beta;
        // A ← A − v wᴴ − w vᴴ on the rest, w = x − ½ τ (xᴴ v) v, x = τ A v.
        let size = n - k - 1;
        let row = |i: usize| (k + 1 + i) * n + k + 1;
        let mut w: Vec<T> = (0..size)
            .map(|i| {
                a[row(i)..row(i) + size].iter().zip(&v).fold(T::of(0.0), |sum, (&x, &y)| sum + x * y) * tau
            })
            .collect();
        let half = tau * dot(&w, &v) * 0.5;
        w.iter_mut().zip(&v).for_each(|(w, &v)| *w -= half * v);
        for i in 0..size {
            let (vi, wi) = (v[i], w[i]);
            let line = &mut a[row(i)..row(i) + size];
            for ((value, &vj), &wj) in line.iter_mut().zip(&v).zip(&w) {
                *value -= vi * wj.conj() + wi * vj.conj();
            }
        }
        // Q ← Q H, a column of Q being a row here.
        let mut sums = vec![T::of(0.0); n];
        for (i, &vi) in v.iter().enumerate() {
            let line = &rows[(k + 1 + i) * n..(k + 2 + i) * n];
            sums.iter_mut().zip(line).for_each(|(sum, &q)| *sum += q * vi);
        }
        for (i, &vi) in v.iter().enumerate() {
            let factor = tau * vi.conj();
            let line = &mut rows[(k + 1 + i) * n..(k + 2 + i) * n];
            line.iter_mut().zip(&sums).for_each(|(q, &sum)| *q -= sum * factor);
        }
    }
    let mut diagonal: Vec<f64> = (0..n).map(|i| a[i * n + i].re()).collect();
    tridiagonal(&mut diagonal, &mut off, &mut rows, n)?;
    Ok((diagonal, rows))
}

/// Implicit QL steps on a real tridiagonal matrix (`off[i]` between i and i + 1), turning pairs of rows
/// along.
fn tridiagonal<T: Field>(d: &mut [f64], off: &mut [f64], rows: &mut [T], n: usize) -> Result<(), Failure> {
    for l in 0..n {
        let mut steps = 0;
        loop {
            let m = (l..n - 1)
                .find(|&m| off[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs()))
                .unwrap_or(n - 1);
            if m == l {
                break;
            }
            steps += 1;
            if steps > PATIENCE {
                return Err(Failure::NoConvergence);
            }
            let mut g = (d[l + 1] - d[l]) / (2.0 * off[l]);
            let r = g.hypot(1.0);
            g = d[m] - d[l] + off[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut early = false;
            for i in (l..m).rev() {
                let (f, b) = (s * off[i], c * off[i]);
                let r = f.hypot(g);
                off[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    off[m] = 0.0;
                    early = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let (low, high) = rows.split_at_mut((i + 1) * n);
                for (x, y) in low[i * n..].iter_mut().zip(&mut high[..n]) {
                    (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
                }
            }
            if !early {
                d[l] -= p;
                off[l] = g;
                off[m] = 0.0;
            }
        }
    }
    Ok(())
}

fn svd<T: Field>(a: &[T], m: usize, n: usize) -> Result<Svd<T>, Failure> {
    if m < n {
        // Of the adjoint: A = U S Vᴴ has Aᴴ = V S Uᴴ.
        let adjoint: Vec<T> = (0..m * n).map(|at| a[at % m * n + at / m].conj()).collect();
        let Svd { u, s, vt } = svd(&adjoint, n, m)?;
        let turned = |x: &[T], size: usize| -> Vec<T> {
            (0..size * size).map(|at| x[at % size * size + at / size].conj()).collect()
        };
        return Ok(Svd { u: turned(&vt, m), s, vt: turned(&u, n) });
    }
    // Rows of `w` are columns of A·V, rows of `v` columns of V.
    let columns: Vec<Vec<T>> = (0..n).map(|j| (0..m).map(|i| a[i * n + j]).collect()).collect();
    let mut gram: Vec<T> = (0..n * n).map(|at| dot(&columns[at / n], &columns[at % n])).collect();
    let (_, start) = hermitian(&mut gram, n)?;
    let mut v: Vec<Vec<T>> = start.chunks_exact(n.max(1)).map(<[T]>::to_vec).collect();
    let mut w: Vec<Vec<T>> = v
        .iter()
        .map(|v| {
            let mut sum = vec![T::of(0.0); m];
            for (column, &factor) in columns.iter().zip(v) {
                sum.iter_mut().zip(column).for_each(|(sum, &x)| *sum += x * factor);
            }
            sum
        })
        .collect();
    orthogonalize(&mut w, &mut v)?;
    let sizes: Vec<f64> = w.iter().map(|column| norm_sqr(column).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| sizes[j].total_cmp(&sizes[i]));
    let s: Vec<f64> = order.iter().map(|&i| sizes[i]).collect();
    let vt = order.iter().flat_map(|&i| v[i].iter().map(|x| x.conj())).collect();
    let mut left: Vec<Vec<T>> = Vec::with_capacity(m);
    for (&i, &size) in order.iter().zip(&s) {
        if size > 0.0 {
            left.push(w[i].iter().map(|&x| x * (1.0 / size)).collect());
        }
    }
    complete(&mut left, m);
    Ok(Svd { u: (0..m * m).map(|at| left[at % m][at / m]).collect(), s, vt })
}

/// Rotations of pairs until all rows of `w` are orthogonal, the same on `v`.
fn orthogonalize<T: Field>(w: &mut [Vec<T>], v: &mut [Vec<T>]) -> Result<(), Failure> {
    let n = w.len();
    for _ in 0..PATIENCE {
        let mut quiet = true;
        for q in 1..n {
            for p in 0..q {
                let (alpha, beta) = (norm_sqr(&w[p]), norm_sqr(&w[q]));
                let gamma = dot(&w[p], &w[q]);
                let size = gamma.norm_sqr().sqrt();
                if size == 0.0 || size <= 4.0 * f64::EPSILON * (alpha * beta).sqrt() {
                    continue;
                }
                quiet = false;
                let zeta = (beta - alpha) / (2.0 * size);
                let t = 1f64.copysign(zeta) / (zeta.abs() + zeta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                let s = c * t;
                let phase = gamma.conj() * (1.0 / size);
                for list in [&mut *w, &mut *v] {
                    let (low, high) = list.split_at_mut(q);
                    for (x, y) in low[p].iter_mut().zip(&mut high[0]) {
                        let turned = *y * phase;
                        (*x, *y) = (*x * c - turned * s, *x * s + turned * c);
                    }
                }
            }
        }
        if quiet {
            return Ok(());
        }
    }
    Err(Failure::NoConvergence)
}

/// Adds unit vectors until orthonormal rows span all of m dimensions: each time the axis that they
/// cover least, less its projections.
fn complete<T: Field>(rows: &mut Vec<Vec<T>>, m: usize) {
    let mut covered: Vec<f64> = (0..m).map(|i| rows.iter().map(|row| row[i].norm_sqr()).sum()).collect();
    while rows.len() < m {
        let axis = (0..m).min_by(|&i, &j| covered[i].total_cmp(&covered[j])).expect("m is not 0");
        let mut unit = vec![T::of(0.0); m];
        unit[axis] = T::of(1.0);
        // Twice, because the first time leaves rounding errors.
        for _ in 0..2 {
            for row in rows.iter() {
                let along = dot(row, &unit);
                unit.iter_mut().zip(row).for_each(|(x, &y)| *x -= y * along);
            }
        }
        let size = norm_sqr(&unit).sqrt();
        unit.iter_mut().for_each(|x| *x = *x * (1.0 / size));
        covered.iter_mut().zip(&unit).for_each(|(sum, x)| *sum += x.norm_sqr());
        rows.push(unit);
    }
}

/// Eigenvalues and right eigenvectors, each of norm 1 with a real largest component.
pub fn eig(a: &[Complex64], n: usize) -> Result<Eigen<Complex64, Complex64>, Failure> {
    if a.iter().any(|z| !Field::is_finite(*z)) {
        return Err(Failure::NoConvergence);
    }
    let (mut t, mut z) = hessenberg(a, n);
    schur(&mut t, &mut z, n)?;
    let size = norm_sqr(&t).sqrt();
    let smallest = size.max(f64::MIN_POSITIVE) * f64::EPSILON;
    let mut values: Vec<Complex64> = (0..n).map(|i| t[i * n + i]).collect();
    let mut vectors = vec![Complex64::ZERO; n * n];
    for k in 0..n {
        // (T − λ) x = 0 from the bottom up, then back through Z.
        let mut x = vec![Complex64::ZERO; k + 1];
        x[k] = Complex64::ONE;
        for i in (0..k).rev() {
            let sum: Complex64 = (i + 1..=k).map(|j| t[i * n + j] * x[j]).sum();
            let gap = t[i * n + i] - t[k * n + k];
            x[i] = -sum / if gap.norm() < smallest { Complex64::new(smallest, 0.0) } else { gap };
        }
        let column: Vec<Complex64> = (0..n).map(|i| (0..=k).map(|j| z[i * n + j] * x[j]).sum()).collect();
        let norm = norm_sqr(&column).sqrt();
        let largest = column
            .iter()
            .fold(Complex64::ZERO, |top, z| if z.norm_sqr() > top.norm_sqr() { *z } else { top });
        let turn = largest.conj() / (largest.norm() * norm);
        column.iter().enumerate().for_each(|(i, value)| vectors[i * n + k] = value * turn);
    }
    if a.iter().all(|z| z.im == 0.0) {
        // Real eigenvalues of real matrices have nothing but rounding in their imaginary parts.
        let rounding = 8.0 * n as f64 * f64::EPSILON * size;
        values.iter_mut().filter(|value| value.im.abs() <= rounding).for_each(|value| value.im = 0.0);
    }
    Ok(Eigen { values, vectors })
}

/// H and Z with A = Z H Zᴴ, H zero below its first subdiagonal.
fn hessenberg(a: &[Complex64], n: usize) -> (Vec<Complex64>, Vec<Complex64>) {
    let mut h = a.to_vec();
    let mut z = vec![Complex64::ZERO; n * n];
    (0..n).for_each(|i| z[i * n + i] = Complex64::ONE);
    for k in 0..n.saturating_sub(2) {
        let mut v: Vec<Complex64> = (k + 1..n).map(|i| h[i * n + k]).collect();
        let Some((_, tau)) = reflection(&mut v) else { continue };
        // From the left by I − τ* v vᴴ, from the right by I − τ v vᴴ.
        for j in 0..n {
            let sum: Complex64 = v.iter().enumerate().map(|(i, v)| v.conj() * h[(k + 1 + i) * n + j]).sum();
            let factor = tau.conj() * sum;
            v.iter().enumerate().for_each(|(i, v)| h[(k + 1 + i) * n + j] -= factor * v);
        }
        for matrix in [&mut h, &mut z] {
            for line in matrix.chunks_exact_mut(n) {
                let line = &mut line[k + 1..];
                let sum: Complex64 = line.iter().zip(&v).map(|(x, v)| x * v).sum();
                let factor = tau * sum;
                line.iter_mut().zip(&v).for_each(|(x, v)| *x -= factor * v.conj());
            }
        }
        (k + 2..n).for_each(|i| h[i * n + k] = Complex64::ZERO);
    }
    (h, z)
}

/// QR steps with Wilkinson's shift until H is upper triangular.
fn schur(h: &mut [Complex64], z: &mut [Complex64], n: usize) -> Result<(), Failure> {
    let (mut high, mut steps) = (n.saturating_sub(1), 0);
    while high > 0 {
        let small = |h: &[Complex64], i: usize| {
            let near = h[(i - 1) * n + i - 1].norm() + h[i * n + i].norm();
            h[i * n + i - 1].norm() <= f64::EPSILON * near || h[i * n + i - 1].norm() < f64::MIN_POSITIVE
        };
        let low = (1..=high).rev().find(|&i| small(h, i)).unwrap_or(0);
        if low > 0 {
            h[low * n + low - 1] = Complex64::ZERO;
        }
        if low == high {
            (high, steps) = (high - 1, 0);
            continue;
        }
        steps += 1;
        if steps > PATIENCE {
            return Err(Failure::NoConvergence);
        }
        let at = |i: usize, j: usize| h[i * n + j];
        let shift = if steps % 10 == 0 {
            // Out of a cycle.
            at(high, high) + at(high, high - 1).norm()
        } else {
            let (a, b) = (at(high - 1, high - 1), at(high - 1, high));
            let (c, d) = (at(high, high - 1), at(high, high));
            let half = (a - d) * 0.5;
            let root = (half * half + b * c).sqrt();
            let sum = if (half.conj() * root).re >= 0.0 { half + root } else { half - root };
            if sum == Complex64::ZERO { d } else { d - b * c / sum }
        };
        (low..=high).for_each(|i| h[i * n + i] -= shift);
        let mut turns = Vec::with_capacity(high - low);
        for k in low..high {
            // [c s; −s* c] takes (x, y) to (r, 0).
            let (x, y) = (h[k * n + k], h[(k + 1) * n + k]);
            let r = x.norm().hypot(y.norm());
            let (c, s) = if r == 0.0 {
                (1.0, Complex64::ZERO)
            } else if x == Complex64::ZERO {
                (0.0, y.conj() / y.norm())
            } else {
                (x.norm() / r, x / x.norm() * y.conj() / r)
            };
            turns.push((c, s));
            let (above, below) = h.split_at_mut((k + 1) * n);
            for (p, q) in above[k * n + k..].iter_mut().zip(&mut below[k..n]) {
                (*p, *q) = (*p * c + s * *q, *q * c - s.conj() * *p);
            }
        }
        for (k, (c, s)) in (low..high).zip(turns) {
            for (matrix, rows) in [(&mut *h, (k + 2).min(high + 1)), (&mut *z, n)] {
                for line in matrix.chunks_exact_mut(n).take(rows) {
                    let (p, q) = (line[k], line[k + 1]);
                    (line[k], line[k + 1]) = (p * c + q * s.conj(), q * c - p * s);
                }
            }
        }
        (low..=high).for_each(|i| h[i * n + i] += shift);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_testkit::Rng;

    fn random(count: usize, seed: u64, complex: bool) -> Vec<Complex64> {
        let mut rng = Rng::new(seed);
        (0..count)
            .map(|_| Complex64::new(rng.normal() as f64, if complex { rng.normal() as f64 } else { 0.0 }))
            .collect()
    }

    fn product(a: &[Complex64], b: &[Complex64], m: usize, k: usize, n: usize) -> Vec<Complex64> {
        (0..m * n).map(|at| (0..k).map(|p| a[at / n * k + p] * b[p * n + at % n]).sum()).collect()
    }

    fn adjoint(a: &[Complex64], n: usize) -> Vec<Complex64> {
        (0..n * n).map(|at| a[at % n * n + at / n].conj()).collect()
    }

    #[track_caller]
    fn close(name: &str, a: &[Complex64], b: &[Complex64]) {
        assert_eq!(a.len(), b.len(), "{name}");
        let size = 1.0 + b.iter().map(|z| z.norm()).fold(0.0, f64::max);
        for (i, (x, y)) in a.iter().zip(b).enumerate() {
            assert!((x - y).norm() <= 1e-12 * size, "{name}: element {i} is {x}, expected {y}");
        }
    }

    fn identity(n: usize) -> Vec<Complex64> {
        (0..n * n).map(|i| Complex64::new((i / n == i % n) as u8 as f64, 0.0)).collect()
    }

    fn check_svd(name: &str, a: &[Complex64], m: usize, n: usize) {
        let k = m.min(n);
        let Svd { u, s, vt } = if a.iter().any(|z| z.im != 0.0) {
            svd_complex(a, m, n).unwrap()
        } else {
            let real: Vec<f64> = a.iter().map(|z| z.re).collect();
            let svd = svd_real(&real, m, n).unwrap();
            let lift = |x: Vec<f64>| x.into_iter().map(Complex64::from).collect();
            Svd { u: lift(svd.u), s: svd.s, vt: lift(svd.vt) }
        };
        let scaled: Vec<Complex64> = (0..m * k).map(|at| u[at / k * m + at % k] * s[at % k]).collect();
        close(name, &product(&scaled, &vt[..k * n], m, k, n), a);
        close(name, &product(&adjoint(&u, m), &u, m, m, m), &identity(m));
        close(name, &product(&vt, &adjoint(&vt, n), n, n, n), &identity(n));
        assert!(s.windows(2).all(|pair| pair[0] >= pair[1]) && s.iter().all(|&s| s >= 0.0), "{name}: {s:?}");
    }

    #[test]
    fn singular_values_and_vectors() {
        for (m, n) in [(1, 1), (2, 2), (5, 3), (3, 5), (24, 24), (40, 7)] {
            for complex in [false, true] {
                let name = format!("[{m}, {n}], complex {complex}");
                check_svd(&name, &random(m * n, (m * 31 + n) as u64, complex), m, n);
            }
        }
        // Of rank one, zero, with equal values, and of sizes far apart.
        let ones = vec![Complex64::ONE; 12];
        check_svd("rank one", &ones, 4, 3);
        check_svd("zero", &[Complex64::ZERO; 6], 2, 3);
        check_svd("identity", &identity(5), 5, 5);
        let graded: Vec<Complex64> = random(36, 5, true)
            .iter()
            .enumerate()
            .map(|(i, z)| z * 10f64.powi(-3 * (i as i32 % 6)))
            .collect();
        check_svd("graded", &graded, 6, 6);
    }

    #[test]
    fn eigenvalues_and_vectors() {
        for n in [1, 2, 3, 16, 33] {
            for complex in [false, true] {
                let a = random(n * n, n as u64 + 7, complex);
                let eigen = eig(&a, n).unwrap();
                let scaled: Vec<Complex64> =
                    (0..n * n).map(|at| eigen.vectors[at] * eigen.values[at % n]).collect();
                close("eig", &product(&a, &eigen.vectors, n, n, n), &scaled);
                let hermitian: Vec<Complex64> =
                    (0..n * n).map(|at| a[at] + a[at % n * n + at / n].conj()).collect();
                for upper in [false, true] {
                    // What the other triangle holds does not count.
                    let half: Vec<Complex64> = (0..n * n)
                        .map(|at| match (at / n).cmp(&(at % n)) {
                            std::cmp::Ordering::Less if !upper => Complex64::new(9.0, 9.0),
                            std::cmp::Ordering::Greater if upper => Complex64::new(9.0, 9.0),
                            _ => hermitian[at],
                        })
                        .collect();
                    let eigen = eigh_complex(&half, n, upper).unwrap();
                    let scaled: Vec<Complex64> =
                        (0..n * n).map(|at| eigen.vectors[at] * eigen.values[at % n]).collect();
                    close("eigh", &product(&hermitian, &eigen.vectors, n, n, n), &scaled);
                    let square = product(&adjoint(&eigen.vectors, n), &eigen.vectors, n, n, n);
                    close("orthonormal", &square, &identity(n));
                    assert!(eigen.values.windows(2).all(|pair| pair[0] <= pair[1]), "{:?}", eigen.values);
                }
            }
        }
        let rotation = [0.0, 1.0, -1.0, 0.0].map(Complex64::from);
        let mut values = eig(&rotation, 2).unwrap().values;
        values.sort_by(|a, b| a.im.total_cmp(&b.im));
        close("rotation", &values, &[Complex64::new(0.0, -1.0), Complex64::new(0.0, 1.0)]);
        // A cycle that unshifted steps never leave.
        let cycle = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0].map(Complex64::from);
        let eigen = eig(&cycle, 3).unwrap();
        assert!(eigen.values.iter().all(|z| (z.norm() - 1.0).abs() < 1e-12), "{:?}", eigen.values);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let a = [Complex64::new(f64::NAN, 0.0); 4];
        assert!(matches!(eig(&a, 2), Err(Failure::NoConvergence)));
        assert!(matches!(eigh_complex(&a, 2, false), Err(Failure::NoConvergence)));
        assert!(matches!(svd_complex(&a, 2, 2), Err(Failure::NoConvergence)));
    }
}
