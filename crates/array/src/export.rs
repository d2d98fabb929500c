//! Functions in files: a traced graph with its constants, to be called without the program that
//! built it.
//!
//! The file is a safetensors file. Its metadata holds the graph as JSON under `mica_function`, its
//! tensors are the constants:
//!
//! ```text
//! {"version": 1,
//!  "inputs":    [{"dtype": "float32", "shape": [2, 3]}],
//!  "constants": [{"tensor": "c0"},
//!                {"words": "c1.words", "scales": "c1.scales", "biases": "c1.biases",
//!                 "bits": 4, "group_size": 64}],
//!  "nodes":     [{"op": "matmul", "inputs": ["i0", "c0"], "precision": "exact",
//!                 "outputs": [{"dtype": "float32", "shape": [2, 4]}]}],
//!  "outputs":   ["n0"]}
//! ```
//!
//! `i`, `c` and `n` are an input, a constant and a node, `n3.1` the second output of one. A file
//! comes from a stranger: every node is built by the function that a program would call, with its
//! checks, and must come out with the shape and dtype that the file promises.

mod decode;
mod encode;

use std::fmt;
use std::path::Path;

use mica_io::safetensors::SafeTensors;
use serde_json::Value as Json;

use crate::files::{file_error, read_tensor, safetensors_writer};
use crate::shape::Shape;
use crate::storage::Spec;
use crate::transforms::TracedGraph;
use crate::{Array, Dtype, Error, Result};

/// The key of the graph in the file's metadata.
const KEY: &str = "mica_function";
/// What this program writes, and all that it reads.
const VERSION: u64 = 1;
/// No dimension, and no array, of a file has more elements.
const MOST_ELEMENTS: usize = 1 << 40;

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
/// # Errors
/// Those of `f`, of evaluating what it captured, of writing; an op that writes to a store.
pub fn export_function(
    path: impl AsRef<Path>,
    f: impl FnOnce(&[Array]) -> Result<Vec<Array>>,
    inputs: &[Array],
) -> Result<()> {
    let expanded = |traced: &[Array]| {
        let outputs = f(traced)?;
        crate::eval::expand_all(&outputs)?;
        Ok(outputs)
    };
    let graph = crate::transforms::simplified(TracedGraph::trace(expanded, inputs)?);
    let (json, tensors) = encode::encode(&graph)?;
    let fail = file_error("export_function");
    let text = json.to_string();
    safetensors_writer(&tensors, &[(KEY, text.as_str())])?.write(path).map_err(&fail)
}

/// A function from a file: see [`export_function`].
pub struct ImportedFunction {
    graph: TracedGraph,
}

/// Reads a function that [`export_function`] wrote.
///
/// # Errors
/// Of reading; a file that is no function, of another version, or whose graph does not fit
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
    let load = |name: &str| -> Result<Array> {
        let info = file.require(name).map_err(&fail)?;
        read_tensor("import_function", &file, info)
    };
    let graph = decode::decode(&json, load).map_err(|error| bad(error.to_string()))?;
    Ok(ImportedFunction { graph })
}

impl ImportedFunction {
    /// The shape and dtype of each input.
    pub fn inputs(&self) -> Vec<(Shape, Dtype)> {
        self.graph.inputs.iter().map(|spec| (spec.shape.clone(), spec.dtype)).collect()
    }

    /// The outputs, as lazy arrays.
    ///
    /// # Errors
    /// Inputs of other shapes or dtypes than the function was traced with.
    pub fn call(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        if inputs.len() != self.graph.inputs.len() {
            return Err(Error::invalid(
                "import_function",
                format!("the function takes {} inputs, got {}", self.graph.inputs.len(), inputs.len()),
            ));
        }
        for (index, (input, spec)) in inputs.iter().zip(&self.graph.inputs).enumerate() {
            if input.spec() != spec {
                return Err(Error::invalid(
                    "import_function",
                    format!("input {index} must be {}{:?}, got {input:?}", spec.dtype, spec.shape.as_slice()),
                ));
            }
        }
        crate::op::first_failure(&inputs.iter().collect::<Vec<_>>())?;
        Ok(self.graph.build(inputs, self.graph.captured()))
    }
}

impl fmt::Debug for ImportedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImportedFunction({} inputs, {} ops)", self.graph.inputs.len(), self.graph.nodes.len())
    }
}

/// Shape and dtype as the file has them.
fn spec_to_json(spec: &Spec) -> Json {
    serde_json::json!({ "dtype": spec.dtype.name(), "shape": spec.shape.as_slice() })
}
