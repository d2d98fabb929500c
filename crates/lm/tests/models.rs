//! Logits of tiny models against the programs that made them.

use mica_array::kv::KvFormat;
use mica_array::{Array, Precision};
use mica_lm::generate::check_tokens;
use mica_lm::load::{Loaded, load};
use mica_lm::models::{Asked, Input};
use mica_lm::weights::Packing;
use mica_nn::Context;
use mica_testkit::{Golden, fixture, max_abs_rel_to_max};

/// Largest error as a share of the largest logit. The goldens are f32 sums in another order.
const TOLERANCE: f64 = 1e-4;

const FLOAT: [&str; 7] = ["llama", "llama-tied", "llama-tied-bf16", "mistral", "qwen2", "qwen3", "lfm2"];
const QUANTIZED: [&str; 12] = [
    "llama-4bit",
    "llama-8bit",
    "llama-4bit-bf16",
    "llama-mixed",
    "qwen3-4bit",
    "qwen3-8bit",
    "qwen3-mxfp4",
    "qwen3-mxfp8",
    "qwen3-nvfp4",
    "llama-tied-4bit",
    "lfm2-4bit",
    "lfm2-8bit",
];

struct Case {
    name: &'static str,
    loaded: Loaded,
    rows: Vec<Vec<u32>>,
    logits: Vec<f32>,
    vocabulary: usize,
}

fn open(name: &'static str, packing: Packing) -> Case {
    let folder = fixture(format!("models/{name}"));
    let golden = Golden::load(folder.join("golden.safetensors"));
    let shape = golden.shape("tokens").to_vec();
    let rows = golden.u32s("tokens").chunks(shape[1]).map(<[u32]>::to_vec).collect();
    let loaded = load(&folder, packing).unwrap_or_else(|error| panic!("{name}: {error}"));
    let vocabulary = loaded.model.info().vocabulary;
    Case { name, loaded, rows, logits: golden.f32s("logits"), vocabulary }
}

impl Case {
    fn input(&self, from: usize, to: usize) -> Input {
        let rows: Vec<&[u32]> = self.rows.iter().map(|row| &row[from..to]).collect();
        Input::new(&rows, &vec![from; rows.len()]).unwrap()
    }

    fn length(&self) -> usize {
        self.rows[0].len()
    }

    fn prefill(&self) -> Vec<f32> {
        let context = Context::new(Precision::Exact);
        let logits = self.loaded.model.logits(&self.input(0, self.length()), None, &context).unwrap();
        assert_eq!(logits.shape(), [self.rows.len(), self.length(), self.vocabulary], "{}", self.name);
        logits.to_vec().unwrap()
    }

    /// Through the cache in pieces of these lengths, the last repeated.
    fn cached(&self, pieces: &[usize]) -> Vec<f32> {
        let context = Context::new(Precision::Exact);
        let mut cache = self.loaded.model.new_cache(self.rows.len(), KvFormat::F32);
        let (mut parts, mut from, mut index) = (Vec::new(), 0, 0);
        while from < self.length() {
            let to = (from + pieces[index.min(pieces.len() - 1)]).min(self.length());
            cache.reserve(to - from).unwrap();
            let logits = self.loaded.model.logits(&self.input(from, to), Some(&mut cache), &context).unwrap();
            cache.advance(to - from);
            parts.push(logits);
            (from, index) = (to, index + 1);
        }
        Array::concatenate(&parts, 1).unwrap().to_vec().unwrap()
    }

    fn check(&self, what: &str, got: &[f32]) {
        let error = max_abs_rel_to_max(got, &self.logits);
        assert!(error <= TOLERANCE, "{}, {what}: largest error {error:.2e} of the largest logit", self.name);
    }
}

#[test]
fn logits_equal_transformers_in_prefill_and_token_by_token() {
    for name in FLOAT {
        let case = open(name, Packing::Frozen);
        case.check("prefill", &case.prefill());
        case.check("token by token", &case.cached(&[1]));
        case.check("prompt in pieces", &case.cached(&[7, 3, 1]));
    }
}

#[test]
fn unpacked_weights_give_the_same() {
    for name in FLOAT {
        let case = open(name, Packing::Quantized);
        case.check("prefill", &case.prefill());
    }
}

#[test]
fn quantized_logits_equal_mlx_lm_in_exact_mode() {
    for name in QUANTIZED {
        let case = open(name, Packing::Frozen);
        case.check("prefill", &case.prefill());
        case.check("token by token", &case.cached(&[1]));
    }
}

/// What is asked for of the last position alone, or of some, are the bits of a pass that gives all of them.
#[test]
fn some_positions_alone_have_the_same_bits() {
    for name in FLOAT.into_iter().chain(QUANTIZED) {
        for precision in [Precision::Exact, Precision::Bf16, Precision::Fast] {
            let case = open(name, Packing::Frozen);
            let (model, context) = (&case.loaded.model, Context::new(precision));
            let (rows, length) = (case.rows.len(), case.length());
            let logits = |asked: Asked| {
                let input = Input { asked, ..case.input(0, length) };
                let mut cache = model.new_cache(rows, KvFormat::F32);
                cache.reserve(length).unwrap();
                [None, Some(&mut cache)].map(|cache| model.logits(&input, cache, &context).unwrap())
            };
            let all = logits(Asked::All);
            // Of all rows together, not in order, one twice.
            let some = [rows * length - 1, 0, 2, length - 1, 2].map(|at| at as i32);
            let these = Array::from_slice(&some, &[some.len()]).unwrap();
            let last = |all: &Array| all.narrow(1, length - 1, length).unwrap();
            let taken = |all: &Array| {
                all.flatten_axes(0, 1).unwrap().take(&these, 0).unwrap().expand_dims(&[0]).unwrap()
            };
            let asks: [(Asked, &dyn Fn(&Array) -> Array); 2] =
                [(Asked::Last, &last), (Asked::These(these.clone()), &taken)];
            for (asked, of_all) in asks {
                for (some, all) in logits(asked.clone()).iter().zip(&all) {
                    let all = of_all(all);
                    assert_eq!(some.shape(), all.shape(), "{name}");
                    let [some, all] = [some, &all].map(|array| array.to_vec::<f32>().unwrap());
                    let bits =
                        |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&some), bits(&all), "{name}, {precision:?}, {asked:?}");
                }
            }
        }
    }
}

/// Blocks that would be computed again in a backward pass compute the same forward.
#[test]
fn checkpointed_blocks_have_the_same_bits() {
    for name in FLOAT.into_iter().chain(QUANTIZED) {
        let case = open(name, Packing::Frozen);
        let context = Context::new(Precision::Bf16);
        let bits = |checkpoint| {
            let input = Input { checkpoint, ..case.input(0, case.length()) };
            let logits = case.loaded.model.logits(&input, None, &context).unwrap().to_vec::<f32>().unwrap();
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let kept = bits(0..0);
        for checkpoint in [0..1, 1..2, 0..usize::MAX] {
            assert_eq!(bits(checkpoint.clone()), kept, "{name}, {checkpoint:?}");
        }
    }
}

#[test]
fn both_dialects_of_the_configuration_open() {
    for name in FLOAT {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture(format!("models/{name}"))).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        std::fs::rename(folder.path().join("config.other.json"), folder.path().join("config.json")).unwrap();
        let mut case = open(name, Packing::Frozen);
        case.loaded = load(folder.path(), Packing::Frozen).unwrap_or_else(|error| panic!("{name}: {error}"));
        case.check("the other dialect", &case.prefill());
    }
}

/// Other rope settings on the tiny Llama (fixtures/rope/models.json, made by fixtures/make/make_rope_models.py).
#[test]
fn rope_settings_compute_and_reach_as_in_transformers() {
    let text = std::fs::read_to_string(fixture("rope/models.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, case) in golden["cases"].as_object().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let source = fixture("models/llama");
        std::fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        let text = std::fs::read_to_string(source.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (key, value) in case["config"].as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let loaded = load(folder.path(), Packing::Frozen).unwrap_or_else(|error| panic!("{name}: {error}"));
        let length = case["length"].as_u64().unwrap() as usize;
        let tokens: Vec<u32> = (0..length as u32).map(|i| i * 7 % 331).collect();
        check_tokens(loaded.model.as_ref(), &tokens).unwrap_or_else(|error| panic!("{name}: {error}"));
        let input = Input::new(&[&tokens], &[0]).unwrap();
        let logits = loaded.model.logits(&input, None, &Context::new(Precision::Exact)).unwrap();
        let got = logits.narrow(1, length - 1, length).unwrap().to_vec::<f32>().unwrap();
        let expected: Vec<f32> =
            case["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let error = max_abs_rel_to_max(&got, &expected);
        assert!(error <= TOLERANCE, "{name}: largest error {error:.2e} of the largest logit");
        // What would not be exact is refused, and the message says why.
        let most = loaded.model.info().max_positions;
        let bounded = name.starts_with("longrope") || name.starts_with("dynamic");
        let error = check_tokens(loaded.model.as_ref(), &vec![1; most + 1]).unwrap_err().to_string();
        assert_eq!(error.contains("context of training"), bounded, "{name}: {error}");
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_nor_on_the_cut() {
    for name in ["llama", "qwen3-4bit", "lfm2"] {
        let case = open(name, Packing::Frozen);
        let whole = case.cached(&[23]);
        assert_eq!(whole, case.cached(&[1]), "{name}: cut into single tokens");
        assert_eq!(whole, case.cached(&[5, 11]), "{name}: cut into pieces");
        let alone = Case { rows: case.rows[..1].to_vec(), ..case };
        assert_eq!(whole[..whole.len() / alone_count(&whole, &alone)], alone.cached(&[23]), "{name}: alone");
    }
}

fn alone_count(whole: &[f32], alone: &Case) -> usize {
    whole.len() / (alone.length() * alone.vocabulary)
}

#[test]
fn of_a_table_that_is_no_head_a_step_reads_no_more_than_rows() {
    use mica_lm::memory::{read_a_step, weights_read};
    for (name, tied) in
        [("llama", false), ("llama-tied", true), ("llama-4bit", false), ("llama-tied-4bit", true)]
    {
        let model = open(name, Packing::Frozen).loaded.model;
        let bytes = |wanted: &str| -> u64 {
            let all = mica_nn::parameters(model.as_module());
            let some = all.into_iter().filter(|(name, _)| name.starts_with(wanted));
            let of = |array: Array| array.packed().map_or(array.size() * array.dtype().size(), |w| w.bytes());
            some.map(|(_, array)| of(array) as u64).sum()
        };
        let (all, table) = (bytes(""), bytes("model.embed_tokens"));
        assert!(table > 0 && (bytes("lm_head") == 0) == tied, "{name}");
        assert_eq!(weights_read(&*model), if tied { all } else { all - table }, "{name}");
        assert_eq!(weights_read(&*model), read_a_step(all, table, tied), "{name}");
    }
}
