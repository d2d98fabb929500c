//! Recurrent layers over [.., length, features].

use mica_array::{Array, Dtype, Result};

use super::invalid;
use crate::activations::tanh;
use crate::{Keys, Parameter, init, module};

fn uniform(shape: &[usize], hidden: usize, keys: &mut Keys) -> Result<Parameter> {
    let bound = 1.0 / (hidden as f64).sqrt();
    Ok(init::uniform(shape, -bound, bound, Dtype::F32, keys)?.into())
}

fn check(op: &'static str, x: &Array) -> Result<()> {
    if x.rank() < 2 || x.dim(-2) == 0 {
        return Err(invalid(
            op,
            format!("expected [.., length, features] with a length, got {:?}", x.shape()),
        ));
    }
    Ok(())
}

/// x · wᵀ (+ bias)
fn project(x: &Array, w: &Array, bias: &Option<Parameter>) -> Result<Array> {
    let y = x.matmul(&w.transpose(&[])?)?;
    match bias {
        Some(bias) => y.add(bias),
        None => Ok(y),
    }
}

/// What comes in at each step: [.., features] each.
fn steps(x: &Array) -> Result<Vec<Array>> {
    (0..x.dim(-2)).map(|at| x.narrow(-2, at, at + 1)?.squeeze(&[-2])).collect()
}

/// h = tanh(x · Wxhᵀ + h · Whhᵀ + bias)
#[derive(Clone, Debug)]
pub struct Rnn {
    /// [hidden, input]
    pub wxh: Parameter,
    /// [hidden, hidden]
    pub whh: Parameter,
    /// \[hidden\]
    pub bias: Option<Parameter>,
    /// The function around the sum: tanh at first.
    pub nonlinearity: fn(&Array) -> Result<Array>,
}

module!(Rnn { wxh as "Wxh", whh as "Whh", bias });

impl Rnn {
    /// New weights, uniform in ±1/√hidden.
    pub fn new(input_size: usize, hidden_size: usize, bias: bool, keys: &mut Keys) -> Result<Rnn> {
        let wxh = uniform(&[hidden_size, input_size], hidden_size, keys)?;
        let whh = uniform(&[hidden_size, hidden_size], hidden_size, keys)?;
        let bias = if bias { Some(uniform(&[hidden_size], hidden_size, keys)?) } else { None };
        Ok(Rnn { wxh, whh, bias, nonlinearity: tanh })
    }

    /// The hidden states: [.., length, hidden]. `hidden` [.., hidden] is that before the first.
    pub fn forward(&self, x: &Array, hidden: Option<&Array>) -> Result<Array> {
        check("RNN", x)?;
        let mut hidden = hidden.cloned();
        let mut all = Vec::new();
        for x in steps(&project(x, &self.wxh, &self.bias)?)? {
            let sum = match hidden {
                Some(hidden) => x.add(hidden.matmul(&self.whh.transpose(&[])?)?)?,
                None => x,
            };
            let next = (self.nonlinearity)(&sum)?;
            all.push(next.clone());
            hidden = Some(next);
        }
        Array::stack(&all, -2)
    }
}

/// Gated recurrent unit (Cho et al. 2014).
#[derive(Clone, Debug)]
pub struct Gru {
    /// [3 · hidden, input]: reset, update, new.
    pub wx: Parameter,
    /// [3 · hidden, hidden]
    pub wh: Parameter,
    /// [3 · hidden]
    pub b: Option<Parameter>,
    /// \[hidden\]
    pub bhn: Option<Parameter>,
}

module!(Gru { wx as "Wx", wh as "Wh", b, bhn });

impl Gru {
    /// New weights, uniform in ±1/√hidden.
    pub fn new(input_size: usize, hidden_size: usize, bias: bool, keys: &mut Keys) -> Result<Gru> {
        let wx = uniform(&[3 * hidden_size, input_size], hidden_size, keys)?;
        let wh = uniform(&[3 * hidden_size, hidden_size], hidden_size, keys)?;
        let b = if bias { Some(uniform(&[3 * hidden_size], hidden_size, keys)?) } else { None };
        let bhn = if bias { Some(uniform(&[hidden_size], hidden_size, keys)?) } else { None };
        Ok(Gru { wx, wh, b, bhn })
    }

    /// The hidden states: [.., length, hidden]. `hidden` [.., hidden] is that before the first.
    pub fn forward(&self, x: &Array, hidden: Option<&Array>) -> Result<Array> {
        check("GRU", x)?;
        let size = self.wh.dim(1);
        let mut hidden = hidden.cloned();
        let mut all = Vec::new();
        for x in steps(&project(x, &self.wx, &self.b)?)? {
            let [mut rz, mut n] = halves(&x, 2 * size)?;
            let mut from_hidden = self.bhn.as_ref().map(|bias| bias.array().clone());
            if let Some(hidden) = &hidden {
                let [h_rz, h_n] = halves(&hidden.matmul(&self.wh.transpose(&[])?)?, 2 * size)?;
                rz = rz.add(h_rz)?;
                from_hidden = Some(match from_hidden {
                    Some(bias) => h_n.add(bias)?,
                    None => h_n,
                });
            }
            let [r, z] = halves(&rz.sigmoid()?, size)?;
            if let Some(from_hidden) = from_hidden {
                n = n.add(r.multiply(from_hidden)?)?;
            }
            let new = z.negative()?.add(1.0)?.multiply(n.tanh()?)?;
            let next = match &hidden {
                Some(hidden) => new.add(z.multiply(hidden)?)?,
                None => new,
            };
            all.push(next.clone());
            hidden = Some(next);
        }
        Array::stack(&all, -2)
    }
}

/// The first `at` features and the others.
fn halves(x: &Array, at: usize) -> Result<[Array; 2]> {
    Ok([x.narrow(-1, 0, at)?, x.narrow(-1, at, x.dim(-1))?])
}

/// Long short-term memory (Hochreiter & Schmidhuber 1997).
#[derive(Clone, Debug)]
pub struct Lstm {
    /// [4 · hidden, input]: input, forget, cell, output.
    pub wx: Parameter,
    /// [4 · hidden, hidden]
    pub wh: Parameter,
    /// [4 · hidden]
    pub bias: Option<Parameter>,
}

module!(Lstm { wx as "Wx", wh as "Wh", bias });

impl Lstm {
    /// New weights, uniform in ±1/√hidden.
    pub fn new(input_size: usize, hidden_size: usize, bias: bool, keys: &mut Keys) -> Result<Lstm> {
        let wx = uniform(&[4 * hidden_size, input_size], hidden_size, keys)?;
        let wh = uniform(&[4 * hidden_size, hidden_size], hidden_size, keys)?;
        let bias = if bias { Some(uniform(&[4 * hidden_size], hidden_size, keys)?) } else { None };
        Ok(Lstm { wx, wh, bias })
    }

    /// The hidden states and the cells: [.., length, hidden] each. `hidden` and `cell`
    /// [.., hidden] are those before the first.
    pub fn forward(&self, x: &Array, hidden: Option<&Array>, cell: Option<&Array>) -> Result<(Array, Array)> {
        check("LSTM", x)?;
        let size = self.wh.dim(1);
        let (mut hidden, mut cell) = (hidden.cloned(), cell.cloned());
        let (mut all_hidden, mut all_cells) = (Vec::new(), Vec::new());
        for x in steps(&project(x, &self.wx, &self.bias)?)? {
            let gates = match &hidden {
                Some(hidden) => x.add(hidden.matmul(&self.wh.transpose(&[])?)?)?,
                None => x,
            };
            let gates = gates.split_sizes(&[size; 4], -1)?;
            let new = gates[0].sigmoid()?.multiply(gates[2].tanh()?)?;
            let next = match &cell {
                Some(cell) => gates[1].sigmoid()?.multiply(cell)?.add(new)?,
                None => new,
            };
            let out = gates[3].sigmoid()?.multiply(next.tanh()?)?;
            all_cells.push(next.clone());
            all_hidden.push(out.clone());
            (cell, hidden) = (Some(next), Some(out));
        }
        Ok((Array::stack(&all_hidden, -2)?, Array::stack(&all_cells, -2)?))
    }
}
