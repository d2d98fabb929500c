//! Short-time Fourier transforms: frames of a signal, windowed and transformed, and back.

use super::fft::{Norm, fft, ifft, irfft, rfft};
use crate::op::first_failure;
use crate::{Array, Dtype, Error, Result};

/// What stands before the first and after the last sample when frames are centred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PadMode {
    /// The signal backwards, without its end sample.
    #[default]
    Reflect,
    /// Zeros.
    Constant,
    /// The end sample.
    Edge,
}

impl std::str::FromStr for PadMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<PadMode> {
        Ok(match name {
            "reflect" => PadMode::Reflect,
            "constant" => PadMode::Constant,
            "edge" => PadMode::Edge,
            other => {
                return Err(Error::invalid(
                    "stft",
                    format!("pad_mode should be \"reflect\", \"constant\" or \"edge\", got {other:?}"),
                ));
            }
        })
    }
}

/// Arguments of [`stft`] and [`istft`]; the default is MLX's with frames of 2048.
#[derive(Clone, Debug)]
pub struct Stft<'a> {
    /// Samples per transform. [`istft`] infers it if it is not given.
    pub n_fft: Option<usize>,
    /// Samples from frame to frame; n_fft / 4 if not given.
    pub hop_length: Option<usize>,
    /// Samples of a frame that count; n_fft if not given.
    pub win_length: Option<usize>,
    /// One weight per sample of the frame, in the middle of it; ones if not given.
    pub window: Option<&'a Array>,
    /// Whether frame t is centred at t · hop_length.
    pub center: bool,
    /// How the ends are padded then.
    pub pad_mode: PadMode,
    /// Where the factor stands.
    pub norm: Norm,
    /// Only frequencies from zero to half; the default is that for real signals.
    pub onesided: Option<bool>,
}

impl Default for Stft<'_> {
    fn default() -> Self {
        Stft {
            n_fft: None,
            hop_length: None,
            win_length: None,
            window: None,
            center: true,
            pad_mode: PadMode::Reflect,
            norm: Norm::Backward,
            onesided: None,
        }
    }
}

impl Stft<'_> {
    fn hop(&self, op: &'static str, n_fft: usize) -> Result<usize> {
        match self.hop_length.unwrap_or(n_fft / 4) {
            0 => Err(Error::invalid(op, format!("hop_length should be positive (n_fft is {n_fft})"))),
            hop => Ok(hop),
        }
    }

    /// The window [n_fft], zeros around it.
    fn weights(&self, op: &'static str, n_fft: usize) -> Result<Array> {
        let length = match self.window {
            Some(window) if window.rank() != 1 => {
                return Err(Error::invalid(op, format!("a window has one dimension, got {window:?}")));
            }
            Some(window) => self.win_length.unwrap_or(window.size()),
            None => self.win_length.unwrap_or(n_fft),
        };
        let window = match self.window {
            Some(window) => window.astype(Dtype::F32)?,
            None => Array::ones(&[length], Dtype::F32),
        };
        if length == 0 || length > n_fft || window.size() != length {
            return Err(Error::invalid(
                op,
                format!(
                    "a window of {} samples, win_length {length} and n_fft {n_fft} do not fit",
                    window.size()
                ),
            ));
        }
        let before = (n_fft - length) / 2;
        let zeros = |count: usize| Array::zeros(&[count], Dtype::F32);
        Array::concatenate(&[zeros(before), window, zeros(n_fft - length - before)], 0)
    }
}

/// Places [frames, n_fft] of every frame's samples.
fn places(frames: usize, hop: usize, n_fft: usize) -> Result<Array> {
    let starts = Array::arange(0.0, frames as f64, 1.0, Dtype::I32)?.multiply(hop)?.expand_dims(&[1])?;
    starts.add(Array::arange(0.0, n_fft as f64, 1.0, Dtype::I32)?)
}

/// The transform of every frame of the last axis: [.., samples] → complex [.., frequencies, frames].
pub fn stft(x: &Array, options: &Stft) -> Result<Array> {
    const NAME: &str = "stft";
    first_failure(&[x])?;
    let n_fft = options.n_fft.unwrap_or(2048);
    if x.rank() == 0 || n_fft == 0 {
        return Err(Error::invalid(
            NAME,
            format!("needs a signal and a positive n_fft, got {x:?} and {n_fft}"),
        ));
    }
    let complex = x.dtype() == Dtype::C64;
    let hop = options.hop(NAME, n_fft)?;
    let weights = options.weights(NAME, n_fft)?;
    let mut x = if complex { x.clone() } else { x.astype(Dtype::F32)? };
    if options.center {
        x = padded(&x, n_fft / 2, options.pad_mode)?;
    }
    let samples = x.dim(-1);
    if samples < n_fft {
        return Err(Error::invalid(
            NAME,
            format!("the signal of {samples} samples is shorter than n_fft {n_fft}"),
        ));
    }
    let frames = x.take(&places((samples - n_fft) / hop + 1, hop, n_fft)?, -1)?.multiply(&weights)?;
    let spectrum = match options.onesided.unwrap_or(!complex) {
        true if complex => {
            return Err(Error::invalid(NAME, "a complex signal has two sides: onesided should be false"));
        }
        true => rfft(&frames, None, -1, options.norm)?,
        false => fft(&frames, None, -1, options.norm)?,
    };
    spectrum.swap_axes(-1, -2)
}

fn padded(x: &Array, by: usize, mode: PadMode) -> Result<Array> {
    let samples = x.dim(-1);
    if by == 0 {
        return Ok(x.clone());
    }
    if mode == PadMode::Constant {
        let mut shape = x.shape().to_vec();
        *shape.last_mut().expect("a signal has an axis") = by;
        let zeros = Array::zeros(&shape, x.dtype());
        return Array::concatenate(&[zeros.clone(), x.clone(), zeros], -1);
    }
    if samples == 0 || (mode == PadMode::Reflect && by >= samples) {
        return Err(Error::invalid("stft", format!("{samples} samples are too few to pad {by} by {mode:?}")));
    }
    let last = samples as i64 - 1;
    let indices: Vec<i32> = (-(by as i64)..samples as i64 + by as i64)
        .map(|at| match mode {
            PadMode::Edge => at.clamp(0, last) as i32,
            _ => (last - (last - at.abs()).abs()) as i32,
        })
        .collect();
    x.take(&Array::from_slice(&indices, &[indices.len()])?, -1)
}

/// The signal [.., samples] of complex [.., frequencies, frames]: the windowed frames added up, over the
/// sum of the squared windows. `length` cuts the result or fills it with zeros.
pub fn istft(spectrum: &Array, options: &Stft, length: Option<usize>) -> Result<Array> {
    const NAME: &str = "istft";
    first_failure(&[spectrum])?;
    if spectrum.rank() < 2 || spectrum.dim(-2) == 0 || spectrum.dim(-1) == 0 {
        return Err(Error::invalid(
            NAME,
            format!("needs [.., frequencies, frames], got {:?}", spectrum.shape()),
        ));
    }
    let onesided = options.onesided.unwrap_or(true);
    let (frequencies, frames) = (spectrum.dim(-2), spectrum.dim(-1));
    let n_fft = options.n_fft.unwrap_or(if onesided { 2 * (frequencies - 1) } else { frequencies });
    let expected = if onesided { n_fft / 2 + 1 } else { n_fft };
    if n_fft == 0 || frequencies != expected {
        return Err(Error::invalid(
            NAME,
            format!("n_fft {n_fft} has {expected} frequencies, got {frequencies}"),
        ));
    }
    let hop = options.hop(NAME, n_fft)?;
    let weights = options.weights(NAME, n_fft)?;
    let turned = spectrum.swap_axes(-1, -2)?;
    let pieces = if onesided {
        irfft(&turned, Some(n_fft), -1, options.norm)?
    } else {
        // MLX gives real signals only.
        ifft(&turned, None, -1, options.norm)?.real()?
    };
    let places = places(frames, hop, n_fft)?;
    let samples = n_fft + hop * (frames - 1);
    let weighted = pieces.multiply(&weights)?;
    let sum = Array::scatter_add(&weighted, &places, weighted.rank() - 2, samples)?;
    let squares = weights.square()?.broadcast_to(&[frames, n_fft])?.contiguous()?;
    let envelope = Array::scatter_add(&squares, &places, 0, samples)?;
    // Where no window reaches, the sum is zero anyway.
    let covered = envelope.greater(1e-10)?;
    let signal = sum.divide(Array::select(&covered, &envelope, 1.0)?)?;
    let (from, to) =
        if options.center { (n_fft / 2, (samples - n_fft / 2).max(n_fft / 2)) } else { (0, samples) };
    let to = length.map_or(to, |length| samples.min(from + length));
    let signal = signal.narrow(-1, from, to.max(from))?;
    match length {
        Some(length) if signal.dim(-1) < length => {
            let mut shape = signal.shape().to_vec();
            *shape.last_mut().expect("a signal has an axis") = length - signal.dim(-1);
            Array::concatenate(&[signal.clone(), Array::zeros(&shape, signal.dtype())], -1)
        }
        _ => Ok(signal),
    }
}
