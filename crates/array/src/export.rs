//! Functions in files: traced graphs with their constants, to be called without the program that
//! built them.
//!
//! The file is a safetensors file. Its metadata holds the graphs as JSON under `mica_function`, its
//! tensors are the constants, which the functions share:
//!
//! ```text
//! {"version": 1,
//!  "constants": [{"tensor": "c0"},
//!                {"words": "c1.words", "scales": "c1.scales", "biases": "c1.biases",
//!                 "bits": 4, "group_size": 64}],
//!  "functions": [
//!    {"inputs":  [{"dtype": "float32", "shape": [2, 3]}],
//!     "nodes":   [{"op": "matmul", "inputs": ["i0", "c0"], "precision": "exact",
//!                  "outputs": [{"dtype": "float32", "shape": [2, 4]}]}],
//!     "outputs": ["n0"]}]}
//! ```
//!
//! `i`, `c` and `n` are an input, a constant and a node, `n3.1` the second output of one. A function
//! that takes inputs of many sizes has `"sizes": {"s0": 2}`, with the sizes that it was traced on,
//! and names them where a shape depends on them: `["s0", 3, "2*s0+1"]`.
//!
//! A file comes from a stranger: every node is built by the function that a program would call, with
//! its checks, and must come out with the shape and dtype that the file promises.

mod algebra;
mod decode;
mod encode;
mod sizes;

use std::fmt;
use std::path::{Path, PathBuf};

use mica_io::safetensors::SafeTensors;
use serde_json::{Value as Json, json};

use crate::files::{file_error, read_tensor, safetensors_writer};
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::TracedGraph;
use crate::{Array, Dtype, Error, Result};

/// The key of the graphs in the file's metadata.
const KEY: &str = "mica_function";
/// What this program writes, and all that it reads.
const VERSION: u64 = 1;
/// No dimension, and no array, of a file has more elements.
const MOST_ELEMENTS: usize = 1 << 40;

/// The shapes and dtypes of a function's inputs. A size that may vary is zero.
pub type Signature = Vec<(Shape, Dtype)>;

/// Writes `f`, traced on inputs of these shapes and dtypes, to a file, with the values of all
/// arrays that it captured. Compiled functions and checkpoints within are written out in full.
///
/// ```
/// use mica_array::{Array, export_function, import_function};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("scaled.safetensors");
/// let w = Array::from_slice(&[2.0f32, 3.0], &[2])?;
/// let x = Array::from_slice(&[1.0f32, 1.0], &[2])?;
/// export_function(&path, |x| Ok(vec![x[0].multiply(&w)?.exp()?]), &[x.clone()])?;
/// let f = import_function(&path)?;
/// assert_eq!(f.call(&[x])?[0].shape(), [2]);
/// # Ok::<(), mica_array::Error>(())
/// ```
///
/// [`FunctionExporter`] writes several traces, or one for inputs of many sizes.
///
/// # Errors
/// Those of `f`, of evaluating what it captured, of writing; an op that writes to a store or that
/// the program defined itself without saying what it is made of.
pub fn export_function(
    path: impl AsRef<Path>,
    f: impl Fn(&[Array]) -> Result<Vec<Array>>,
    inputs: &[Array],
) -> Result<()> {
    let mut exporter = FunctionExporter::new(path, f);
    exporter.trace(inputs)?;
    exporter.finish()
}

/// Writes several traces of one function to a file, which share its constants.
///
/// ```
/// use mica_array::{Array, Dtype, FunctionExporter, import_function};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("sum.safetensors");
/// let sum = |x: &[Array]| Ok(vec![x[1..].iter().try_fold(x[0].clone(), |a, b| a.add(b))?]);
/// let mut exporter = FunctionExporter::new(&path, sum).shapeless().metadata("sums");
/// let x = Array::ones(&[2, 3], Dtype::F32);
/// exporter.trace(&[x.clone()])?;
/// exporter.trace(&[x.clone(), x])?;
/// exporter.finish()?;
///
/// let f = import_function(&path)?;
/// let y = Array::ones(&[5, 4], Dtype::F32);
/// assert_eq!(f.call(&[y.clone(), y])?[0].shape(), [5, 4]);
/// assert_eq!(f.metadata(), Some("sums"));
/// # Ok::<(), mica_array::Error>(())
/// ```
#[must_use = "nothing is written before `finish`"]
pub struct FunctionExporter<F> {
    path: PathBuf,
    f: F,
    shapeless: bool,
    metadata: Option<String>,
    constants: encode::Constants,
    functions: Vec<Json>,
}

impl<F: Fn(&[Array]) -> Result<Vec<Array>>> FunctionExporter<F> {
    /// For a file that [`FunctionExporter::finish`] writes.
    pub fn new(path: impl AsRef<Path>, f: F) -> Self {
        FunctionExporter {
            path: path.as_ref().to_path_buf(),
            f,
            shapeless: false,
            metadata: None,
            constants: encode::Constants::default(),
            functions: Vec::new(),
        }
    }

    /// Traces serve inputs of other sizes too.
    ///
    /// Which sizes may change is found out by tracing on others, so `f` is called several times per
    /// trace. Sizes that are equal in the traced inputs change together, those of one stay, and so
    /// do those that `f` does not work without; give it inputs whose sizes differ where they may.
    /// A function that decides by a size what to do must not be exported this way.
    pub fn shapeless(self) -> Self {
        FunctionExporter { shapeless: true, ..self }
    }

    /// A text that is kept in the file.
    pub fn metadata(self, text: &str) -> Self {
        FunctionExporter { metadata: Some(text.to_string()), ..self }
    }

    /// Adds a trace on inputs of these shapes and dtypes.
    ///
    /// # Errors
    /// As [`export_function`], and if there is a trace for such inputs already.
    pub fn trace(&mut self, inputs: &[Array]) -> Result<()> {
        let mut constants = self.constants.clone();
        let graph = traced(&self.f, inputs)?;
        let function = match self.shapeless {
            true => sizes::generalized(&self.f, inputs, &graph, &mut constants)?,
            false => encode::encode(&graph, &mut constants)?,
        };
        if self.functions.iter().any(|other| other["inputs"] == function["inputs"]) {
            return Err(Error::invalid(
                "export_function",
                format!("there is a trace for such inputs already: {}", function["inputs"]),
            ));
        }
        self.constants = constants;
        self.functions.push(function);
        Ok(())
    }

    /// Writes the file, atomically.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(self) -> Result<()> {
        let mut json = json!({
            "version": VERSION,
            "constants": self.constants.list,
            "functions": self.functions,
        });
        if let Some(text) = self.metadata {
            json["metadata"] = text.into();
        }
        let text = json.to_string();
        safetensors_writer(&self.constants.tensors, &[(KEY, text.as_str())])?
            .write(&self.path)
            .map_err(file_error("export_function"))
    }
}

impl<F> fmt::Debug for FunctionExporter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FunctionExporter({}, {} traces)", self.path.display(), self.functions.len())
    }
}

/// The graph of a function, compiled parts and checkpoints opened.
fn traced(f: &impl Fn(&[Array]) -> Result<Vec<Array>>, inputs: &[Array]) -> Result<TracedGraph> {
    let expanded = |traced: &[Array]| {
        let outputs = f(traced)?;
        crate::eval::expand_all(&outputs)?;
        Ok(outputs)
    };
    Ok(crate::transforms::simplified(TracedGraph::trace(expanded, inputs)?))
}

/// A function from a file: see [`export_function`].
pub struct ImportedFunction {
    traces: Vec<Trace>,
    constants: Vec<Array>,
    metadata: Option<String>,
}

/// One trace of the file.
struct Trace {
    /// On the inputs that it was traced with.
    graph: TracedGraph,
    /// For inputs of other sizes.
    general: Option<Json>,
}

/// Reads a function that [`export_function`] or a [`FunctionExporter`] wrote.
///
/// # Errors
/// Of reading; a file that is no function, of another version, or whose graphs do not fit
/// together: the message names the node.
pub fn import_function(path: impl AsRef<Path>) -> Result<ImportedFunction> {
    let path = path.as_ref();
    let fail = file_error("import_function");
    let file = SafeTensors::open(path).map_err(&fail)?;
    let bad = |what: String| Error::invalid("import_function", format!("{}: {what}", path.display()));
    let text = file.metadata().get(KEY).ok_or_else(|| {
        bad(format!("holds no function: its metadata has no {KEY:?}; load_safetensors reads plain tensors"))
    })?;
    let json: Json = serde_json::from_str(text).map_err(|error| bad(format!("{KEY} is no JSON: {error}")))?;
    let version = json.get("version").and_then(Json::as_u64);
    if version != Some(VERSION) {
        return Err(bad(format!(
            "this program reads functions of version {VERSION}, this one is of {version:?}"
        )));
    }
    let load = |name: &str| -> Result<Array> {
        let info = file.require(name).map_err(&fail)?;
        read_tensor("import_function", &file, info)
    };
    let read = || -> Result<ImportedFunction> {
        let constants = decode::constants(&json, load)?;
        let traces = decode::list(&json, "functions")?
            .iter()
            .map(|function| Trace::new(function, &constants))
            .collect::<Result<Vec<Trace>>>()?;
        let metadata = json.get("metadata").map(|_| decode::text(&json, "metadata")).transpose()?;
        Ok(ImportedFunction { traces, constants, metadata: metadata.map(str::to_string) })
    };
    read().map_err(|error| bad(error.to_string()))
}

impl Trace {
    fn new(json: &Json, constants: &[Array]) -> Result<Trace> {
        let Some(recorded) = json.get("sizes") else {
            return Ok(Trace { graph: decode::decode(json, constants)?, general: None });
        };
        let recorded = sizes::recorded(recorded)?;
        let graph = decode::decode(&sizes::filled(json, &recorded)?, constants)?;
        Ok(Trace { graph, general: Some(json.clone()) })
    }

    fn signature(&self) -> Signature {
        let recorded = self.graph.inputs.iter().map(|spec| (spec.shape.clone(), spec.dtype));
        let mut all: Signature = recorded.collect();
        if let Some(json) = &self.general {
            for (index, (shape, _)) in all.iter_mut().enumerate() {
                for (axis, size) in shape.iter_mut().enumerate() {
                    if json["inputs"][index]["shape"][axis].is_string() {
                        *size = 0;
                    }
                }
            }
        }
        all
    }

    /// Why these inputs are none for the trace, if they aren't.
    fn mismatch(&self, inputs: &[Array]) -> Option<String> {
        let expected = self.signature();
        if inputs.len() != expected.len() {
            return Some(format!("the function takes {} inputs, got {}", expected.len(), inputs.len()));
        }
        let fits = |input: &Array, (shape, dtype): &(Shape, Dtype)| {
            let varies = self.general.is_some();
            input.dtype() == *dtype
                && input.rank() == shape.len()
                && input.shape().iter().zip(shape).all(|(a, b)| a == b || (varies && *b == 0))
        };
        inputs
            .iter()
            .zip(&expected)
            .enumerate()
            .find(|(_, (input, spec))| !fits(input, spec))
            .map(|(index, (input, spec))| format!("input {index} must be {}, got {input:?}", spec_name(spec)))
    }
}

/// As `float32[2, 3]`.
fn spec_name((shape, dtype): &(Shape, Dtype)) -> String {
    format!("{dtype}{:?}", shape.as_slice())
}

impl ImportedFunction {
    /// The shapes and dtypes of the inputs of each trace in the file.
    pub fn signatures(&self) -> Vec<Signature> {
        self.traces.iter().map(Trace::signature).collect()
    }

    /// The text that was written with the function.
    pub fn metadata(&self) -> Option<&str> {
        self.metadata.as_deref()
    }

    /// The outputs, as lazy arrays.
    ///
    /// # Errors
    /// If the function was traced on no inputs of such shapes and dtypes.
    pub fn call(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        let bad = |what: String| Error::invalid("import_function", what);
        let Some(trace) = self.traces.iter().find(|trace| trace.mismatch(inputs).is_none()) else {
            if let [only] = self.traces.as_slice() {
                return Err(bad(only.mismatch(inputs).expect("it was not found")));
            }
            let all: Vec<String> = self
                .signatures()
                .iter()
                .map(|inputs| format!("({})", inputs.iter().map(spec_name).collect::<Vec<_>>().join(", ")))
                .collect();
            return Err(bad(format!("no trace takes {inputs:?}; there are {}", all.join(", "))));
        };
        crate::op::first_failure(&inputs.iter().collect::<Vec<_>>())?;
        let as_traced = || inputs.iter().zip(&trace.graph.inputs).all(|(input, spec)| input.spec() == spec);
        match &trace.general {
            Some(json) if !as_traced() => {
                let sizes = sizes::of_inputs(json, inputs)?;
                let graph = decode::decode(&sizes::filled(json, &sizes)?, &self.constants)?;
                Ok(graph.build(inputs, graph.captured()))
            }
            _ => Ok(trace.graph.build(inputs, trace.graph.captured())),
        }
    }
}

impl fmt::Debug for ImportedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops: usize = self.traces.iter().map(|trace| trace.graph.nodes.len()).sum();
        write!(f, "ImportedFunction({} traces, {ops} ops)", self.traces.len())
    }
}

/// Shape and dtype as the file has them.
fn spec_to_json(spec: &Spec) -> Json {
    json!({ "dtype": spec.dtype.name(), "shape": spec.shape.as_slice() })
}
