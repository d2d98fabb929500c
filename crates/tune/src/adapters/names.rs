//! Names and layouts of adapter tensors in both forms.

use crate::{Error, Result};

/// Which tensor of an adapted layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The factor next to the input.
    A,
    /// The factor next to the output.
    B,
    /// DoRA's magnitudes, `[out]`.
    Magnitude,
}

/// What kind of layer is adapted; decides the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// A linear layer.
    Linear,
    /// An embedding table.
    Embedding,
    /// Fused experts, so many of them.
    Experts(usize),
}

/// The form of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// mlx-lm's.
    Mlx,
    /// PEFT's.
    Peft,
}

impl Form {
    /// The name of the file with the tensors.
    pub fn file_name(self) -> &'static str {
        match self {
            Form::Mlx => "adapters.safetensors",
            Form::Peft => "adapter_model.safetensors",
        }
    }
}

/// A tensor of an adapter, by what it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorName {
    /// Path of the layer in the model: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Which tensor of it.
    pub part: Part,
    /// Whether the name says that the layer is an embedding (only PEFT's names do).
    pub embedding: bool,
}

const PEFT_PREFIX: &str = "base_model.model.";

/// PEFT's endings. `.default` is the name of an adapter, which older files carry.
const PEFT_ENDINGS: [(&str, Part, bool); 5] = [
    ("lora_A", Part::A, false),
    ("lora_B", Part::B, false),
    ("lora_magnitude_vector", Part::Magnitude, false),
    ("lora_embedding_A", Part::A, true),
    ("lora_embedding_B", Part::B, true),
];

impl TensorName {
    /// Reads a tensor's name in either form; `None` if it is not an adapter's.
    pub fn parse(name: &str) -> Option<(Form, TensorName)> {
        if let Some(rest) = name.strip_prefix(PEFT_PREFIX) {
            let rest = rest.strip_suffix(".weight").unwrap_or(rest);
            let rest = rest.strip_suffix(".default").unwrap_or(rest);
            let (module, ending) = rest.rsplit_once('.')?;
            let (_, part, embedding) = PEFT_ENDINGS.into_iter().find(|(name, ..)| *name == ending)?;
            // PEFT wraps the second projection of fused experts around the first.
            return Some((Form::Peft, TensorName { module: module.into(), part, embedding }));
        }
        let (module, ending) = name.rsplit_once('.')?;
        let part = match ending {
            "lora_a" => Part::A,
            "lora_b" => Part::B,
            "m" => Part::Magnitude,
            _ => return None,
        };
        Some((Form::Mlx, TensorName { module: module.into(), part, embedding: false }))
    }

    /// The tensor's name in a form.
    pub fn write(&self, form: Form) -> String {
        let module = &self.module;
        match (form, self.part, self.embedding) {
            (Form::Mlx, Part::A, _) => format!("{module}.lora_a"),
            (Form::Mlx, Part::B, _) => format!("{module}.lora_b"),
            (Form::Mlx, Part::Magnitude, _) => format!("{module}.m"),
            // Embedding factors are parameters and not layers in PEFT, so they have no ".weight".
            (Form::Peft, Part::A, true) => format!("{PEFT_PREFIX}{module}.lora_embedding_A"),
            (Form::Peft, Part::B, true) => format!("{PEFT_PREFIX}{module}.lora_embedding_B"),
            (Form::Peft, Part::A, false) => format!("{PEFT_PREFIX}{module}.lora_A.weight"),
            (Form::Peft, Part::B, false) => format!("{PEFT_PREFIX}{module}.lora_B.weight"),
            (Form::Peft, Part::Magnitude, _) => format!("{PEFT_PREFIX}{module}.lora_magnitude_vector"),
        }
    }
}

/// The shape that a tensor has in the other form.
pub fn converted_shape(shape: &[usize], part: Part, layer: Layer, from: Form) -> Result<Vec<usize>> {
    let bad = || {
        Error::Config(format!(
            "an adapter's {part:?} of {layer:?} in {from:?} form cannot have the shape {shape:?}"
        ))
    };
    match (part, layer, from) {
        (Part::Magnitude, ..) => Ok(shape.to_vec()),
        (_, Layer::Linear | Layer::Embedding, _) => match *shape {
            [rows, columns] => Ok(vec![columns, rows]),
            _ => Err(bad()),
        },
        // [E, r, in] or already [E·r, in] ↔ [E·r, in].
        (Part::A, Layer::Experts(_), Form::Mlx) => match *shape {
            [experts, rank, inputs] => Ok(vec![experts * rank, inputs]),
            [_, _] => Ok(shape.to_vec()),
            _ => Err(bad()),
        },
        (Part::A, Layer::Experts(count), Form::Peft) => match *shape {
            [rows, inputs] if count > 0 && rows % count == 0 => Ok(vec![count, rows / count, inputs]),
            _ => Err(bad()),
        },
        // [E, out, r] ↔ [out, r·E].
        (Part::B, Layer::Experts(_), Form::Mlx) => match *shape {
            [experts, outputs, rank] => Ok(vec![outputs, rank * experts]),
            _ => Err(bad()),
        },
        (Part::B, Layer::Experts(count), Form::Peft) => match *shape {
            [outputs, columns] if count > 0 && columns % count == 0 => {
                Ok(vec![count, outputs, columns / count])
            }
            _ => Err(bad()),
        },
    }
}

/// The tensor's elements in the order of the other form: `(bytes, shape)`.
///
/// `bytes` are the row-major elements, `size` bytes each, of a tensor of this shape in the form `from`.
pub fn convert(
    bytes: &[u8],
    size: usize,
    shape: &[usize],
    part: Part,
    layer: Layer,
    from: Form,
) -> Result<(Vec<u8>, Vec<usize>)> {
    let target = converted_shape(shape, part, layer, from)?;
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if elements.and_then(|n| n.checked_mul(size)) != Some(bytes.len()) {
        return Err(Error::Config(format!(
            "{} bytes are not a tensor of {shape:?} with {size} bytes each",
            bytes.len()
        )));
    }
    let unchanged = match (part, layer) {
        (Part::Magnitude, _) | (Part::A, Layer::Experts(_)) => true,
        _ => bytes.is_empty(),
    };
    if unchanged {
        return Ok((bytes.to_vec(), target));
    }
    // Every other change moves one axis: source index as a function of the target's.
    let source: Box<dyn Fn(usize) -> usize> = match (layer, from) {
        (Layer::Experts(count), Form::Mlx) => {
            let (outputs, rank) = (shape[1], shape[2]);
            // Target [out, r, E] from [E, out, r].
            Box::new(move |i| {
                let (o, r, e) = (i / (rank * count), i / count % rank, i % count);
                (e * outputs + o) * rank + r
            })
        }
        (Layer::Experts(count), Form::Peft) => {
            let (outputs, rank) = (target[1], target[2]);
            // Target [E, out, r] from [out, r, E].
            Box::new(move |i| {
                let (e, o, r) = (i / (outputs * rank), i / rank % outputs, i % rank);
                (o * rank + r) * count + e
            })
        }
        _ => {
            let (rows, columns) = (shape[0], shape[1]);
            Box::new(move |i| i % rows * columns + i / rows)
        }
    };
    let mut out = Vec::with_capacity(bytes.len());
    for i in 0..bytes.len() / size {
        let at = source(i) * size;
        out.extend_from_slice(&bytes[at..at + size]);
    }
    Ok((out, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_forms() {
        let cases = [
            ("model.layers.3.mlp.up_proj.lora_a", Form::Mlx, "model.layers.3.mlp.up_proj", Part::A, false),
            ("model.layers.3.mlp.up_proj.m", Form::Mlx, "model.layers.3.mlp.up_proj", Part::Magnitude, false),
            (
                "base_model.model.model.layers.0.q.lora_A.weight",
                Form::Peft,
                "model.layers.0.q",
                Part::A,
                false,
            ),
            (
                "base_model.model.model.layers.0.q.lora_B.default.weight",
                Form::Peft,
                "model.layers.0.q",
                Part::B,
                false,
            ),
            ("base_model.model.q.lora_magnitude_vector", Form::Peft, "q", Part::Magnitude, false),
            (
                "base_model.model.q.lora_magnitude_vector.default.weight",
                Form::Peft,
                "q",
                Part::Magnitude,
                false,
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_A",
                Form::Peft,
                "model.embed_tokens",
                Part::A,
                true,
            ),
        ];
        for (name, form, module, part, embedding) in cases {
            let expected = TensorName { module: module.into(), part, embedding };
            assert_eq!(TensorName::parse(name), Some((form, expected.clone())), "{name}");
            for form in [Form::Mlx, Form::Peft] {
                let written = expected.write(form);
                let (read_form, read) = TensorName::parse(&written).unwrap();
                assert_eq!((read_form, &read.module, read.part), (form, &expected.module, part), "{written}");
            }
        }
        for name in ["model.norm.weight", "lora_a", "base_model.model.q.weight", ""] {
            assert_eq!(TensorName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn layouts_change_as_documented_and_back() {
        let two = Layer::Experts(2);
        // (part, layer, mlx shape, mlx elements, peft shape, peft elements)
        let cases: [(Part, Layer, &[usize], &[u8], &[usize], &[u8]); 5] = [
            (Part::A, Layer::Linear, &[3, 2], &[0, 1, 2, 3, 4, 5], &[2, 3], &[0, 2, 4, 1, 3, 5]),
            (Part::B, Layer::Embedding, &[2, 1], &[7, 8], &[1, 2], &[7, 8]),
            (Part::Magnitude, Layer::Linear, &[3], &[1, 2, 3], &[3], &[1, 2, 3]),
            (Part::A, two, &[2, 1, 2], &[0, 1, 2, 3], &[2, 2], &[0, 1, 2, 3]),
            // Elements are e·100 + o·10 + r of [E=2, out=2, r=3].
            (
                Part::B,
                two,
                &[2, 2, 3],
                &[0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112],
                &[2, 6],
                &[0, 100, 1, 101, 2, 102, 10, 110, 11, 111, 12, 112],
            ),
        ];
        for (part, layer, mlx_shape, mlx, peft_shape, peft) in cases {
            let to = convert(mlx, 1, mlx_shape, part, layer, Form::Mlx).unwrap();
            assert_eq!(to, (peft.to_vec(), peft_shape.to_vec()), "{part:?} of {layer:?}");
            let back = convert(peft, 1, peft_shape, part, layer, Form::Peft).unwrap();
            assert_eq!(back, (mlx.to_vec(), mlx_shape.to_vec()), "{part:?} of {layer:?} back");
        }
        let wide = convert(&[0, 1, 2, 3, 4, 5, 6, 7], 2, &[2, 2], Part::A, Layer::Linear, Form::Mlx).unwrap();
        assert_eq!(wide.0, [0, 1, 4, 5, 2, 3, 6, 7]);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let cases: [(&[usize], Part, Layer, Form); 4] = [
            (&[3], Part::A, Layer::Linear, Form::Mlx),
            (&[3, 2], Part::A, Layer::Experts(2), Form::Peft),
            (&[3, 2], Part::B, Layer::Experts(0), Form::Peft),
            (&[2, 2], Part::B, Layer::Experts(2), Form::Mlx),
        ];
        for (shape, part, layer, form) in cases {
            assert!(converted_shape(shape, part, layer, form).is_err(), "{shape:?} {part:?} {layer:?}");
        }
        assert!(convert(&[0; 5], 1, &[2, 3], Part::A, Layer::Linear, Form::Mlx).is_err());
        assert!(convert(&[0; 5], 1, &[usize::MAX, 3], Part::A, Layer::Linear, Form::Mlx).is_err());
    }
}
