//! Adapter files and models: an adapter of either form is put on a model, and one is written from it.
//!
//! The tensors say which layers have an adapter; the settings say how it is scaled. A tensor that has no place
//! in the model is an error, because a part of an adapter is another model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mica_array::files::{load_safetensors, safetensors_writer};
use mica_array::{Array, Dtype};
use mica_lm::models::LanguageModel;
use mica_nn::{Adapter, Linear, Parameter, parameters, set_parameters};

use super::attach::full_name;
use super::config::AdapterSettings;
use super::names::{Form, Part, TensorName};
use crate::config::AdapterConfig;
use crate::{Error, Result};

/// The settings beside the tensors, in both forms.
const SETTINGS: &str = "adapter_config.json";

/// An adapter that was put on a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Opened {
    /// Its settings.
    pub settings: AdapterSettings,
    /// The names of its tensors in the parameter tree.
    pub names: Vec<String>,
    /// The file that they came from.
    pub file: PathBuf,
}

/// Puts the adapter of a folder, mlx-lm's or PEFT's, on a model.
///
/// # Errors
/// Missing or foreign files, tensors without a place in the model, shapes that do not fit.
pub fn load(model: &mut dyn LanguageModel, folder: impl AsRef<Path>) -> Result<Opened> {
    let folder = folder.as_ref();
    if !folder.join(SETTINGS).exists() {
        let what = if folder.exists() { format!("holds no {SETTINGS}") } else { "is not there".into() };
        return Err(missing(
            folder,
            what + "; an adapter is a folder with adapter_config.json and its tensors",
        ));
    }
    let settings = AdapterSettings::read(folder)?;
    let file = folder.join(settings.form.file_name());
    if !file.exists() {
        return Err(missing(folder, format!("holds no tensors: there is no {}", settings.form.file_name())));
    }
    let tensors = read(&file)?;
    let names = match &settings.adapter {
        Some(adapter) => place(model, adapter, tensors, &file)?,
        None => {
            let names = tensors.iter().map(|(name, _)| name.clone()).collect();
            replace(model, tensors, &file)?;
            names
        }
    };
    Ok(Opened { settings, names, file })
}

/// Puts the tensors of a file (mlx-lm's names) on a model that has such parameters already: an adapter of the same
/// shape that goes on being trained (`resume_adapter_file`), or trained weights.
pub fn load_tensors(model: &mut dyn LanguageModel, file: impl AsRef<Path>) -> Result<()> {
    let file = file.as_ref();
    if !file.is_file() {
        return Err(missing(file, "there is no such file of adapter tensors"));
    }
    replace(model, read(file)?, file)
}

/// Replaces parameters, in the dtypes that the model has them in.
fn replace(model: &mut dyn LanguageModel, tensors: Vec<(String, Array)>, file: &Path) -> Result<()> {
    let present: BTreeMap<String, Dtype> =
        parameters(model.as_module()).into_iter().map(|(name, array)| (name, array.dtype())).collect();
    let fitting = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let dtype = present.get(&name).copied().unwrap_or(tensor.dtype());
            Ok((name, tensor.astype(dtype)?))
        })
        .collect::<Result<Vec<_>>>()?;
    set_parameters(model.as_module_mut(), &fitting).map_err(|error| bad(file, error))
}

/// Gives every layer the tensors that are its own.
fn place(
    model: &mut dyn LanguageModel,
    config: &AdapterConfig,
    tensors: Vec<(String, Array)>,
    file: &Path,
) -> Result<Vec<String>> {
    let mut layers = BTreeMap::<String, BTreeMap<Part, Array>>::new();
    let mut names = Vec::new();
    for (name, tensor) in tensors {
        let Some((form, parsed)) = TensorName::parse(&name) else {
            return Err(bad(file, format!("the tensor {name} belongs to no adapter that can be read")));
        };
        let transposed = form == Form::Peft && parsed.part != Part::Magnitude;
        let tensor = if transposed { tensor.transpose(&[])?.contiguous()? } else { tensor };
        names.push(parsed.write(Form::Mlx));
        layers.entry(parsed.module).or_default().insert(parsed.part, tensor);
    }
    for layer in 0..model.layers() {
        for (path, linear) in model.linears(layer) {
            let name = full_name(layer, &path);
            let Some(parts) = layers.remove(&name) else { continue };
            let adapter = fitting(linear, parts, config);
            linear.adapter = Some(adapter.map_err(|cause| bad(file, format!("{name}: {cause}")))?);
        }
    }
    if layers.is_empty() {
        return Ok(names);
    }
    let left: Vec<&str> = layers.keys().take(6).map(String::as_str).collect();
    let cause = format!(
        "{} is no linear layer of this model's blocks (adapters on embeddings and the head cannot be read)",
        left.join(", ")
    );
    Err(bad(file, cause))
}

fn fitting(
    linear: &Linear,
    mut parts: BTreeMap<Part, Array>,
    config: &AdapterConfig,
) -> Result<Adapter, String> {
    let (Some(a), Some(b)) = (parts.remove(&Part::A), parts.remove(&Part::B)) else {
        return Err("one of its two factors is missing".into());
    };
    let (out, inputs, rank) = (linear.weight.dim(0), linear.weight.dim(1), config.rank);
    if a.shape() != [inputs, rank] || b.shape() != [rank, out] {
        return Err(format!(
            "factors of {:?} and {:?} do not fit rank {rank} on a layer of {inputs} inputs and {out} outputs",
            a.shape(),
            b.shape()
        ));
    }
    let magnitude = parts.remove(&Part::Magnitude);
    if let Some(magnitude) = &magnitude
        && magnitude.size() != out
    {
        return Err(format!("{:?} magnitudes for {out} outputs", magnitude.shape()));
    }
    let f32 = |array: Array| array.astype(Dtype::F32).map(Parameter::from).map_err(|error| error.to_string());
    let flat = |array: Array| array.reshape(&[-1]).map_err(|error| error.to_string());
    Ok(Adapter {
        a: f32(a)?,
        b: f32(b)?,
        scale: config.scale as f32,
        dropout: config.dropout as f32,
        magnitude: magnitude.map(flat).transpose()?.map(f32).transpose()?,
    })
}

/// Writes the parameters called `names` and the text of their settings into a folder, tensors first: the files
/// that other programs read. Gives the paths.
pub fn save(
    model: &dyn LanguageModel,
    names: &[String],
    form: Form,
    settings: &str,
    folder: impl AsRef<Path>,
) -> Result<Vec<PathBuf>> {
    let folder = folder.as_ref();
    std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, e))?;
    let wanted: std::collections::HashSet<&String> = names.iter().collect();
    let mut tensors = Vec::with_capacity(names.len());
    for (name, array) in parameters(model.as_module()).into_iter().filter(|(name, _)| wanted.contains(name)) {
        tensors.push(match (form, TensorName::parse(&name)) {
            (Form::Peft, Some((_, parsed))) => {
                let array = if parsed.part == Part::Magnitude {
                    array
                } else {
                    array.transpose(&[])?.contiguous()?
                };
                (parsed.write(Form::Peft), array)
            }
            (Form::Peft, None) => {
                return Err(Error::Config(format!("{name} is no adapter's and has no PEFT form")));
            }
            (Form::Mlx, _) => (name, array),
        });
    }
    let (file, settings_file) = (folder.join(form.file_name()), folder.join(SETTINGS));
    let metadata: &[(&str, &str)] = if form == Form::Peft { &[("format", "pt")] } else { &[] };
    safetensors_writer(&tensors, metadata)?.write(&file)?;
    mica_io::atomic::write(&settings_file, settings)?;
    Ok(vec![file, settings_file])
}

fn bad(path: &Path, cause: impl std::fmt::Display) -> Error {
    Error::Adapter { path: path.into(), cause: cause.to_string() }
}

fn missing(path: &Path, what: impl Into<String>) -> Error {
    Error::Missing { path: path.into(), what: what.into() }
}

/// The tensors of a file, of which there are some, all finite.
fn read(file: &Path) -> Result<Vec<(String, Array)>> {
    let tensors = load_safetensors(file)?;
    if tensors.is_empty() {
        return Err(bad(file, "holds no tensors"));
    }
    for (name, tensor) in &tensors {
        let values = tensor.astype(Dtype::F32)?.to_vec::<f32>()?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(bad(
                file,
                format!("{name} holds NaN or infinity, first at element {at}: it is damaged"),
            ));
        }
    }
    Ok(tensors)
}
