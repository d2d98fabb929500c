//! Model folders from model folders: quantized, dequantized, in another dtype, or with other weights.
//!
//! The folder's tensors are walked by name, one at a time, and streamed into a new folder that appears at once;
//! memory holds one tensor. What is not a weight (tokenizer, templates, generation settings) is copied. Which
//! modules can be quantized is decided as `mlx_lm.convert` does: linear layers and embeddings whose rows are whole
//! groups; the others stay as they are, and the files say which is which.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_array::files::{dtype_from_file, dtype_to_file};
use mica_array::quantized::{QuantizedArray, quantize};
use mica_array::{Array, Dtype, PackedWeight};
use mica_io::atomic::AtomicDir;
use mica_io::weights::{ShardedWriter, WeightFiles};
use serde_json::{Value, json};

use crate::config::{ModelConfig, QuantMode, QuantSpec};
use crate::weights::{bad_codes, not_finite, read_finite};
use crate::{Error, Result};

/// Gives the new value of a tensor by its name, or `None` where it stays.
pub type Replace<'a> = &'a dyn Fn(&str) -> Result<Option<Array>>;

/// What is to become of a model.
#[derive(Clone, Copy, Default)]
pub struct Recipe<'a> {
    /// Quantize plain weights so.
    pub quantize: Option<QuantSpec>,
    /// Make quantized weights plain.
    pub dequantize: bool,
    /// Store float tensors (scales and biases too) in this dtype; `None` leaves each as it is.
    pub dtype: Option<Dtype>,
    /// New values for some `….weight`s, in any float dtype; they are stored as the old ones were, quantized with
    /// the same settings if those were quantized.
    pub replace: Option<Replace<'a>>,
    /// Set from outside: stop before the next tensor, and leave nothing behind.
    pub stop: Option<&'a AtomicBool>,
}

impl Recipe<'_> {
    fn go_on(&self) -> Result<()> {
        match self.stop {
            Some(stop) if stop.load(Ordering::Relaxed) => Err(Error::Interrupted),
            _ => Ok(()),
        }
    }
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// The new folder.
    pub folder: PathBuf,
    /// Weights that are quantized in it.
    pub quantized: usize,
    /// Linear weights and embeddings that are not.
    pub plain: usize,
    /// Elements of all weights, before packing.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Converted {
    /// Bits of storage per parameter, scales and biases included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.parameters.max(1) as f64
    }
}

/// Writes the model of the folder `source` into the new folder `target`.
///
/// # Errors
/// A target that holds something already; a source that cannot be opened as a model, or is quantized already when
/// it should be quantized; a mode that cannot be written; files and disk.
pub fn convert(source: impl AsRef<Path>, target: impl AsRef<Path>, recipe: &Recipe) -> Result<Converted> {
    let (source, target) = (source.as_ref(), target.as_ref());
    let config = ModelConfig::load(source)?;
    check(&config, target, recipe)?;
    // What cannot be opened as a model would come out as something else that cannot.
    crate::load::outline(source)?;
    let files = WeightFiles::open(source)?;
    let folder = AtomicDir::create(target)?;
    let mut out = Out {
        recipe,
        config: &config,
        files: &files,
        writer: ShardedWriter::new(),
        done: Converted::default(),
    };
    for name in files.names() {
        out.tensor(name)?;
    }
    out.check_quantized()?;
    let Out { mut writer, mut done, .. } = out;
    let mlx = if recipe.dequantize { false } else { config.quantization.is_quantized() };
    writer.metadata("format", if mlx || recipe.quantize.is_some() { "mlx" } else { "pt" });
    writer.write(folder.path()).map_err(told_by_the_source)?;
    copy_others(source, folder.path())?;
    let text = serde_json::to_string_pretty(&Value::Object(new_config(&config, recipe)))
        .map_err(|error| Error::bad_file(config.path(), error.to_string()))?;
    mica_io::atomic::write(folder.path().join("config.json"), text + "\n")?;
    recipe.go_on()?;
    folder.commit()?;
    done.folder = target.to_path_buf();
    Ok(done)
}

/// What went wrong with a tensor of the source, rather than that its copy could not be written.
fn told_by_the_source(error: mica_io::Error) -> Error {
    match error {
        mica_io::Error::Content { path, what, source } => match source.downcast::<Error>() {
            Ok(error) => *error,
            Err(source) => mica_io::Error::Content { path, what, source }.into(),
        },
        error => error.into(),
    }
}

fn check(config: &ModelConfig, target: &Path, recipe: &Recipe) -> Result<()> {
    if std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) || target.is_file() {
        return Err(Error::Usage(format!(
            "{} exists already and is not empty; choose another folder for the new model, or remove it first",
            target.display()
        )));
    }
    if recipe.quantize.is_some() && config.quantization.is_quantized() && !recipe.dequantize {
        return Err(Error::Usage(format!(
            "{} is quantized already; take its original weights, or dequantize it first",
            config.path().display()
        )));
    }
    if recipe.dtype.is_some_and(|dtype| !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
        return Err(Error::Usage("weights can be stored as float32, float16 or bfloat16".into()));
    }
    Ok(())
}

/// A folder being written.
struct Out<'a> {
    recipe: &'a Recipe<'a>,
    config: &'a ModelConfig,
    files: &'a WeightFiles,
    writer: ShardedWriter<'a>,
    done: Converted,
}

impl<'a> Out<'a> {
    fn tensor(&mut self, name: &'a str) -> Result<()> {
        if name.ends_with("rotary_emb.inv_freq") {
            return Ok(());
        }
        let (module, field) = name.rsplit_once('.').unwrap_or(("", name));
        let coded = self.files.contains(&format!("{module}.scales"));
        match field {
            "scales" | "biases" if coded => Ok(()),
            "weight" if coded => self.quantized(module),
            _ => self.plain(name),
        }
    }

    /// A model that should have been quantized, and of which nothing was, is no result.
    fn check_quantized(&self) -> Result<()> {
        let Some(spec) = self.recipe.quantize.filter(|_| self.done.quantized == 0) else { return Ok(()) };
        let mut widths = std::collections::BTreeSet::new();
        for name in self.files.names().filter(|name| name.ends_with(".weight")) {
            if let [_, width] = *self.files.require(name)?.shape() {
                widths.insert(width);
            }
        }
        let widths: Vec<String> = widths.iter().map(usize::to_string).collect();
        Err(Error::Usage(format!(
            "no weight can be quantized in groups of {}: rows of {} weights are not whole groups{}",
            spec.group_size(),
            widths.join(", "),
            match spec.mode() {
                QuantMode::Affine => "; choose a smaller group size (--q-group-size 32)",
                _ => "",
            }
        )))
    }

    /// A weight that is quantized in the source.
    fn quantized(&mut self, module: &str) -> Result<()> {
        let spec = self.config.quantization.spec(module).ok_or_else(|| Error::BadFile {
            path: self.config.path().to_path_buf(),
            message: format!("{module} has scales, but its quantization is not described"),
            todo: "add its `quantization` entry (bits, group_size, mode)".into(),
        })?;
        let name = format!("{module}.weight");
        let (recipe, files) = (self.recipe, self.files);
        let (words, scales) = (files.require(&name)?, files.require(&format!("{module}.scales"))?);
        let [out, width] = *words.shape() else {
            return Err(Error::bad_file(
                words.path(),
                format!("{name} is quantized but has not two dimensions"),
            ));
        };
        let shape = [out, width * 32 / spec.bits()];
        let affine = spec.mode() == QuantMode::Affine;
        // Scales that are codes have no dtype of floats; such weights are bf16, as MLX has them.
        let stored = if affine { float_type(scales.path(), &name, scales.dtype())? } else { Dtype::BF16 };
        let dtype = recipe.dtype.unwrap_or(stored);
        let new = match recipe.replace {
            Some(replace) => replace(&name)?,
            None => None,
        };
        if new.is_none() && !recipe.dequantize && (dtype == stored || !affine) {
            for field in &["weight", "scales", "biases"][..if affine { 3 } else { 2 }] {
                self.copy(&format!("{module}.{field}"), None)?;
            }
            self.count(&shape, true);
            return Ok(());
        }
        let module_name = module.to_string();
        let value = move || match &new {
            Some(new) => Ok(new.clone()),
            None => {
                let read = |field: &str| read(files, &format!("{module_name}.{field}"));
                // A scale times an integer is no number of half precision: who asks for f32 gets it exactly.
                let wide = |array: Array| if dtype == Dtype::F32 { array.astype(dtype) } else { Ok(array) };
                let (scales, biases) = match affine {
                    true => (wide(read("scales")?)?, Some(wide(read("biases")?)?)),
                    false => (read("scales")?, None),
                };
                let codes = QuantizedArray::new(read("weight")?, scales, biases, spec, None)?;
                // Small floats are numbers of bf16, whatever they become then.
                let packed = PackedWeight::from_mlx(&codes)
                    .map_err(|error| bad_codes(files.path(), &module_name, error.into()))?;
                Ok(Array::from_packed(packed).dequantize()?)
            }
        };
        let target = if recipe.dequantize { recipe.quantize } else { Some(spec) };
        self.weight(module, &shape, dtype, target, value);
        Ok(())
    }

    /// A tensor that is plain in the source.
    fn plain(&mut self, name: &'a str) -> Result<()> {
        let (recipe, files) = (self.recipe, self.files);
        let weight = files.require(name)?;
        let new = match recipe.replace {
            Some(replace) => replace(name)?,
            None => None,
        };
        let Some(stored) = dtype_from_file(weight.dtype()).filter(|dtype| dtype.is_float()) else {
            return self.copy(name, None);
        };
        let dtype = recipe.dtype.unwrap_or(stored);
        let shape = weight.shape();
        let matrix = shape.len() == 2 && name.ends_with(".weight");
        let target = recipe.quantize.filter(|spec| matrix && shape[1] % spec.group_size() == 0);
        if target.is_none() && new.is_none() && dtype == stored {
            let layout = self.convolution(name, shape);
            self.copy(name, layout)?;
            if matrix {
                self.count(shape, false);
            } else {
                self.done.parameters += shape.iter().product::<usize>() as u64;
            }
            return Ok(());
        }
        let value = move || match &new {
            Some(new) => Ok(new.clone()),
            None => read(files, name),
        };
        if matrix {
            let module = name.strip_suffix(".weight").expect("checked");
            self.weight(module, shape, dtype, target, value);
            return Ok(());
        }
        let layout = self.convolution(name, shape).unwrap_or_else(|| shape.to_vec());
        self.done.parameters += shape.iter().product::<usize>() as u64;
        self.float(name, &layout, dtype, value);
        Ok(())
    }

    /// The shape of a short convolution in the folder's dialect: [channels, taps, 1] in MLX's, [channels, 1, taps] in
    /// Hugging Face's; the elements are in the same order.
    fn convolution(&self, name: &str, shape: &[usize]) -> Option<Vec<usize>> {
        match *shape {
            [channels, 1, taps] | [channels, taps, 1] if name.ends_with(".conv.weight") => {
                if self.recipe.quantize.is_some() {
                    Some(vec![channels, taps, 1])
                } else if self.recipe.dequantize {
                    Some(vec![channels, 1, taps])
                } else {
                    None
                }
            }
            _ => None,
        }
    }

    /// Writes a matrix, quantized or not, whose value is computed when its turn comes.
    fn weight(
        &mut self,
        module: &str,
        shape: &[usize],
        dtype: Dtype,
        target: Option<QuantSpec>,
        value: impl Fn() -> Result<Array> + 'a,
    ) {
        self.count(shape, target.is_some());
        let Some(spec) = target else { return self.float(&format!("{module}.weight"), shape, dtype, value) };
        let (out, inputs) = (shape[0], shape[1]);
        let (words, groups) = ([out, spec.words(inputs)], [out, inputs / spec.group_size()]);
        let affine = spec.mode() == QuantMode::Affine;
        let scale = if affine { dtype } else { Dtype::U8 };
        let names: &[&str] = if affine { &["scales", "biases"] } else { &["scales"] };
        // The tensors come one after another: the first computes all, the last lets go of them.
        let made: Rc<RefCell<Option<QuantizedArray>>> = Rc::default();
        let make = Rc::clone(&made);
        let label = module.to_string();
        self.done.bytes +=
            (words[0] * words[1] * 4 + names.len() * groups[0] * groups[1] * scale.size()) as u64;
        let recipe = self.recipe;
        self.writer.stream(format!("{module}.weight"), dtype_to_file(Dtype::U32), &words, move |out| {
            recipe.go_on()?;
            let weight = value()?.astype(dtype)?.contiguous()?;
            if weight.shape() != [words[0], inputs] {
                return Err(format!(
                    "{label}: a new weight of {:?} for one of [{}, {inputs}]",
                    weight.shape(),
                    words[0]
                )
                .into());
            }
            let quantized = quantize(&weight, spec, None)?;
            quantized.words.with_bytes(|bytes| out.write_all(bytes))??;
            *make.borrow_mut() = Some(quantized);
            Ok(())
        });
        for (index, part) in names.iter().enumerate() {
            let (made, last) = (Rc::clone(&made), index + 1 == names.len());
            self.writer.stream(format!("{module}.{part}"), dtype_to_file(scale), &groups, move |out| {
                let mut made = made.borrow_mut();
                let codes = made.as_ref().ok_or("scales and biases are written after the words")?;
                let array = if index == 0 { Some(&codes.scales) } else { codes.biases.as_ref() };
                array.ok_or("these codes have no biases")?.with_bytes(|bytes| out.write_all(bytes))??;
                if last {
                    *made = None;
                }
                Ok(())
            });
        }
    }

    /// Writes floats in this dtype, computed when their turn comes.
    fn float(&mut self, name: &str, shape: &[usize], dtype: Dtype, value: impl Fn() -> Result<Array> + 'a) {
        self.done.bytes += (shape.iter().product::<usize>() * dtype.size()) as u64;
        let (size, label) = (shape.iter().product::<usize>(), name.to_string());
        let recipe = self.recipe;
        self.writer.stream(name, dtype_to_file(dtype), shape, move |out| {
            recipe.go_on()?;
            let array = value()?;
            if array.size() != size {
                return Err(format!("{label}: {} values for {size} places", array.size()).into());
            }
            array.astype(dtype)?.contiguous()?.with_bytes(|bytes| match not_finite(bytes, dtype) {
                None => Ok(out.write_all(bytes)?),
                Some(at) => Err(Error::Unsupported {
                    what: format!(
                        "{label}: storing a value that is too large for {dtype}, first at element {at},"
                    ),
                    todo: "store the model as bfloat16 or float32".into(),
                }
                .into()),
            })?
        });
    }

    /// Copies a tensor's bytes, under another shape if one is given.
    fn copy(&mut self, name: &str, shape: Option<Vec<usize>>) -> Result<()> {
        let files = self.files;
        let weight = files.require(name)?;
        let shape = shape.unwrap_or_else(|| weight.shape().to_vec());
        self.done.bytes += weight.byte_len() as u64;
        let label = name.to_string();
        let recipe = self.recipe;
        self.writer.stream(name, weight.dtype(), &shape, move |out| {
            recipe.go_on()?;
            Ok(out.write_all(&files.read(&label)?)?)
        });
        Ok(())
    }

    fn count(&mut self, shape: &[usize], quantized: bool) {
        self.done.parameters += shape.iter().product::<usize>() as u64;
        if quantized { self.done.quantized += 1 } else { self.done.plain += 1 }
    }
}

fn float_type(path: &Path, name: &str, dtype: mica_io::DType) -> Result<Dtype> {
    dtype_from_file(dtype).filter(|dtype| dtype.is_float()).ok_or_else(|| Error::Unsupported {
        what: format!("{}: {name} with scales of {dtype}", path.display()),
        todo: "scales can be float32, float16 or bfloat16".into(),
    })
}

fn read(files: &WeightFiles, name: &str) -> Result<Array> {
    let weight = files.require(name)?;
    let dtype = dtype_from_file(weight.dtype()).ok_or_else(|| Error::Unsupported {
        what: format!("{}: tensor {name} of type {}", weight.path().display(), weight.dtype()),
        todo: "f32, f16, bf16 and integer tensors can be read".into(),
    })?;
    read_finite(&weight, dtype)
}

/// The configuration of the new folder.
fn new_config(config: &ModelConfig, recipe: &Recipe) -> serde_json::Map<String, Value> {
    let mut raw = config.raw.clone();
    let quantized = ["quantization", "quantization_config"];
    if recipe.dequantize {
        quantized.iter().for_each(|key| drop(raw.remove(*key)));
    }
    if let Some(spec) = recipe.quantize {
        let value = json!({"group_size": spec.group_size(), "bits": spec.bits(), "mode": spec.mode().name()});
        quantized.iter().for_each(|key| drop(raw.insert((*key).into(), value.clone())));
    }
    if let Some(dtype) = recipe.dtype {
        let key = if raw.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        raw.insert(key.into(), dtype.to_string().into());
    }
    raw
}

/// Copies what belongs to a model and is not weights or configuration. Code is not copied: none is ever run.
fn copy_others(source: &Path, target: &Path) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Read { what: "a file of the model", path, source }
    };
    for entry in std::fs::read_dir(source).map_err(failed(source))? {
        let path = entry.map_err(failed(source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let kept = matches!(extension, "json" | "jinja" | "txt" | "model" | "tiktoken")
            || name.starts_with("LICENSE")
            || name.starts_with("NOTICE");
        // A link is followed: Hugging Face's cache holds nothing else.
        if kept && path.is_file() && name != "config.json" && !name.ends_with(".safetensors.index.json") {
            std::fs::copy(&path, target.join(name)).map_err(|source| {
                let full = matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
                // A full disk is the target's, anything else more likely the source's.
                if full { mica_io::Error::io("write", target, source).into() } else { failed(&path)(source) }
            })?;
        }
    }
    Ok(())
}
