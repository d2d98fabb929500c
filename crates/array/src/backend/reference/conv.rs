//! Convolution by its sum.

use super::dense::{Dense, ravel, unravel};
use crate::op::ConvNd;
use crate::shape::{Shape, size_of};

pub(super) fn conv(spec: &ConvNd, x: &Dense, w: &Dense, shape: &[usize]) -> Dense {
    let rank = shape.len();
    let spatial = rank - 2;
    let (taps, depth) = (&w.shape[1..rank - 1], w.shape[rank - 1]);
    let per_group = w.shape[0] / spec.groups;
    let result = (0..size_of(shape))
        .map(|at| {
            let index = unravel(at, shape);
            let group = index[rank - 1] / per_group;
            let mut sum = 0.0;
            for tap in 0..size_of(taps) {
                let tap = unravel(tap, taps);
                let place: Option<Shape> = (0..spatial)
                    .map(|axis| {
                        let k = if spec.flip { taps[axis] - 1 - tap[axis] } else { tap[axis] };
                        let q = (index[axis + 1] * spec.stride[axis] + k * spec.kernel_dilation[axis])
                            as isize
                            - spec.low[axis];
                        let dilation = spec.input_dilation[axis] as isize;
                        let inside = q >= 0 && q % dilation == 0 && q / dilation < x.shape[axis + 1] as isize;
                        inside.then(|| (q / dilation) as usize)
                    })
                    .collect();
                let Some(place) = place else { continue };
                for channel in 0..depth {
                    let mut from: Shape = Shape::from_elem(index[0], 1);
                    from.extend_from_slice(&place);
                    from.push(group * depth + channel);
                    let mut weight: Shape = Shape::from_elem(index[rank - 1], 1);
                    weight.extend_from_slice(&tap);
                    weight.push(channel);
                    sum += x.at(ravel(&from, &x.shape)) * w.at(ravel(&weight, &w.shape));
                }
            }
            sum
        })
        .collect();
    Dense::floats(shape, result)
}
