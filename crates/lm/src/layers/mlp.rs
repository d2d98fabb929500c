//! The gated feed-forward block: down(act(gate(x)) · up(x)).

use std::sync::LazyLock;

use mica_array::transforms::{Compiled, compile};
use mica_array::{Array, Result};
use mica_nn::{Context, Item, ItemMut, Layer, Linear, Module, join};

use crate::weights::{Source, linear};

/// What the three projections are called in files.
#[derive(Debug)]
pub struct Names {
    /// The gate.
    pub gate: &'static str,
    /// The way up.
    pub up: &'static str,
    /// The way down.
    pub down: &'static str,
}

/// The names of most families.
pub const NAMES: Names = Names { gate: "gate_proj", up: "up_proj", down: "down_proj" };

/// The function of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x)
    Silu,
    /// Gaussian error linear unit, by erf.
    Gelu,
    /// Gaussian error linear unit, by tanh.
    GeluTanh,
}

impl Activation {
    /// The function that `hidden_act` names.
    pub fn from_name(name: &str) -> Option<Activation> {
        match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu" => Some(Activation::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" => Some(Activation::GeluTanh),
            _ => None,
        }
    }

    /// act(gate) · up in one pass, and both gradients in one more, with nothing kept for them but
    /// the operands.
    fn gated(self, gate: &Array, up: &Array) -> Result<Array> {
        static SILU: LazyLock<Gated> = LazyLock::new(|| gated(|x| Ok(vec![x[0].silu()?.multiply(&x[1])?])));
        static GELU: LazyLock<Gated> = LazyLock::new(|| gated(|x| Ok(vec![x[0].gelu()?.multiply(&x[1])?])));
        static GELU_TANH: LazyLock<Gated> =
            LazyLock::new(|| gated(|x| Ok(vec![x[0].gelu_tanh()?.multiply(&x[1])?])));
        let compiled = match self {
            Activation::Silu => &SILU,
            Activation::Gelu => &GELU,
            Activation::GeluTanh => &GELU_TANH,
        };
        let outputs = compiled.call(&[gate.clone(), up.clone()])?;
        Ok(outputs.into_iter().next().expect("a gated product is one array"))
    }
}

type Gated = Compiled<fn(&[Array]) -> Result<Vec<Array>>>;

/// Compiled once in a process, for all sizes.
fn gated(f: fn(&[Array]) -> Result<Vec<Array>>) -> Gated {
    compile(f).shapeless()
}

/// The block.
#[derive(Debug)]
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    names: &'static Names,
}

impl Module for Mlp {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        see(name, Item::Module(self));
        self.gate.visit(&join(name, self.names.gate), see);
        self.up.visit(&join(name, self.names.up), see);
        self.down.visit(&join(name, self.names.down), see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        see(name, ItemMut::Module(self));
        self.gate.visit_mut(&join(name, self.names.gate), see);
        self.up.visit_mut(&join(name, self.names.up), see);
        self.down.visit_mut(&join(name, self.names.down), see);
    }
}

impl Mlp {
    /// Takes the parameters under `path` from a source.
    pub fn new(
        source: &mut dyn Source,
        path: &str,
        (hidden, inner): (usize, usize),
        bias: bool,
        activation: Activation,
        names: &'static Names,
    ) -> crate::Result<Mlp> {
        Ok(Mlp {
            gate: linear(source, &join(path, names.gate), inner, hidden, bias)?,
            up: linear(source, &join(path, names.up), inner, hidden, bias)?,
            down: linear(source, &join(path, names.down), hidden, inner, bias)?,
            activation,
            names,
        })
    }

    /// The projections, by name, for adapters.
    pub fn linears(&mut self) -> [(&'static str, &mut Linear); 3] {
        [(self.names.gate, &mut self.gate), (self.names.up, &mut self.up), (self.names.down, &mut self.down)]
    }

    /// x [.., hidden] → the same shape.
    pub fn forward(&self, x: &Array, context: &Context) -> Result<Array> {
        let (gate, up) = (self.gate.forward(x, context)?, self.up.forward(x, context)?);
        let inner = self.activation.gated(&context.saved(&gate)?, &context.saved(&up)?)?;
        self.down.forward(&context.saved(&inner)?, context)
    }
}
