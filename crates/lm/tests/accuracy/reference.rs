//! A forward pass in f64, written for reading: Llama with or without Qwen 3's norms of heads.

use std::path::Path;

use half::f16;
use mica_testkit::Golden;
use serde_json::{Value, json};

const ROPE_THETA: f64 = 1e6;
const NORM_EPS: f64 = 1e-6;

/// Sizes of a model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub family: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    /// Norms of query and key heads.
    pub head_norm: bool,
}

impl Shape {
    /// As config.json has it.
    pub fn config(&self) -> Value {
        json!({
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": NORM_EPS,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 512,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": true,
            "hidden_act": "silu",
            "attention_bias": false,
            "torch_dtype": "bfloat16",
        })
    }

    /// Names and sizes of all parameters.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![
            ("model.embed_tokens.weight".to_string(), vec![self.vocabulary, hidden]),
            ("model.norm.weight".to_string(), vec![hidden]),
        ];
        for layer in 0..self.layers {
            let mut add = |name: &str, size: &[usize]| {
                all.push((format!("model.layers.{layer}.{name}.weight"), size.to_vec()));
            };
            add("input_layernorm", &[hidden]);
            add("self_attn.q_proj", &[queries, hidden]);
            add("self_attn.k_proj", &[keys, hidden]);
            add("self_attn.v_proj", &[keys, hidden]);
            add("self_attn.o_proj", &[hidden, queries]);
            if self.head_norm {
                add("self_attn.q_norm", &[self.head_dim]);
                add("self_attn.k_norm", &[self.head_dim]);
            }
            add("post_attention_layernorm", &[hidden]);
            add("mlp.gate_proj", &[inner, hidden]);
            add("mlp.up_proj", &[inner, hidden]);
            add("mlp.down_proj", &[hidden, inner]);
        }
        all
    }
}

/// What enters the linear layers.
#[derive(Clone, Copy)]
pub enum Activations {
    Plain,
    /// As llama.cpp rounds them for its 4-bit weights: int8 in blocks of 32 with a scale in f16.
    Q8_0,
}

impl Activations {
    fn round(self, row: &[f64]) -> Vec<f64> {
        match self {
            Activations::Plain => row.to_vec(),
            Activations::Q8_0 => row.chunks(32).flat_map(q8_0).collect(),
        }
    }
}

fn q8_0(block: &[f64]) -> Vec<f64> {
    let scale = block.iter().fold(0.0f64, |most, x| most.max(x.abs())) / 127.0;
    let stored = f16::from_f64(scale).to_f64();
    block.iter().map(|x| if scale == 0.0 { 0.0 } else { (x / scale).round() * stored }).collect()
}

/// The weights of a folder.
pub struct Reference {
    weights: Golden,
    shape: Shape,
}

/// One row a token.
type Rows = Vec<Vec<f64>>;

impl Reference {
    /// Opens a folder with f32 weights in one file.
    pub fn open(folder: &Path, shape: Shape) -> Reference {
        Reference { weights: Golden::load(folder.join("model.safetensors")), shape }
    }

    fn weight(&self, name: &str) -> Vec<f64> {
        self.weights.f32s(&format!("{name}.weight")).into_iter().map(f64::from).collect()
    }

    /// Logits [tokens, vocabulary], rounded once.
    pub fn logits(&self, tokens: &[u32], activations: Activations) -> Vec<f32> {
        let shape = &self.shape;
        let linear = |x: &Rows, name: &str| -> Rows {
            let (weight, width) = (self.weight(name), x[0].len());
            let rounded = x.iter().map(|row| activations.round(row));
            rounded.map(|row| weight.chunks(width).map(|w| dot(w, &row)).collect()).collect()
        };
        let norm = |x: &Rows, name: &str| -> Rows {
            let weight = self.weight(name);
            x.iter().map(|row| rms_norm(row, &weight)).collect()
        };
        let embedding = self.weight("model.embed_tokens");
        let row = |&token: &u32| embedding[token as usize * shape.hidden..][..shape.hidden].to_vec();
        let mut x: Rows = tokens.iter().map(row).collect();
        for layer in 0..shape.layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            let normed = norm(&x, &path("input_layernorm"));
            let heads = |name: &str, head_norm: Option<&str>| -> Rows {
                let weight = head_norm.filter(|_| shape.head_norm).map(|name| self.weight(&path(name)));
                let mut rows = linear(&normed, &path(name));
                for (position, row) in rows.iter_mut().enumerate() {
                    for head in row.chunks_mut(shape.head_dim) {
                        if let Some(weight) = &weight {
                            head.copy_from_slice(&rms_norm(head, weight));
                        }
                        if head_norm.is_some() {
                            rope(head, position);
                        }
                    }
                }
                rows
            };
            let q = heads("self_attn.q_proj", Some("self_attn.q_norm"));
            let k = heads("self_attn.k_proj", Some("self_attn.k_norm"));
            let v = heads("self_attn.v_proj", None);
            let attended = linear(&self.attention(&q, &k, &v), &path("self_attn.o_proj"));
            add(&mut x, &attended);
            let normed = norm(&x, &path("post_attention_layernorm"));
            let (mut gate, up) =
                (linear(&normed, &path("mlp.gate_proj")), linear(&normed, &path("mlp.up_proj")));
            for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
                *gate = *gate / (1.0 + (-*gate).exp()) * up;
            }
            add(&mut x, &linear(&gate, &path("mlp.down_proj")));
        }
        let logits = linear(&norm(&x, "model.norm"), "model.embed_tokens");
        logits.into_iter().flatten().map(|value| value as f32).collect()
    }

    /// Causal, a group of query heads to each head of keys and values.
    fn attention(&self, q: &Rows, k: &Rows, v: &Rows) -> Rows {
        let (dim, group) = (self.shape.head_dim, self.shape.heads / self.shape.kv_heads);
        let scale = (dim as f64).powf(-0.5);
        let one = |position: usize, head: usize| -> Vec<f64> {
            let query = &q[position][head * dim..][..dim];
            let of = |rows: &'_ Rows, key: usize| rows[key][head / group * dim..][..dim].to_vec();
            let scores: Vec<f64> = (0..=position).map(|key| scale * dot(query, &of(k, key))).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; dim];
            for (key, weight) in weights.iter().enumerate() {
                out.iter_mut().zip(of(v, key)).for_each(|(out, value)| *out += weight / sum * value);
            }
            out
        };
        (0..q.len())
            .map(|position| (0..self.shape.heads).flat_map(|head| one(position, head)).collect())
            .collect()
    }
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}

/// In eight sums, which the compiler turns into vectors: the order of f64 sums is of no account here.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest = a.len() / 8 * 8;
    sums.iter().sum::<f64>() + a[rest..].iter().zip(&b[rest..]).map(|(a, b)| a * b).sum::<f64>()
}

fn rms_norm(row: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = dot(row, row) / row.len() as f64;
    row.iter().zip(weight).map(|(x, weight)| x * weight / (mean + NORM_EPS).sqrt()).collect()
}

/// Turns the pairs (i, i + half).
fn rope(head: &mut [f64], position: usize) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = position as f64 * ROPE_THETA.powf(-(i as f64) / half as f64);
        let (sin, cos) = angle.sin_cos();
        let (a, b) = (head[i], head[i + half]);
        (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}
