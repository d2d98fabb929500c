//! What is done with all parameters or modules of a tree.

use std::collections::HashMap;

use mica_array::quantized::QuantSpec;
use mica_array::{Array, Dtype, Error, Result};

use crate::parameter::Role;
use crate::{Item, ItemMut, Layer, Module, Parameter};

fn invalid(op: &'static str, message: String) -> Error {
    Error::Invalid { op, message: message.into() }
}

fn each<M: Module + ?Sized>(module: &M, mut see: impl FnMut(&str, &Parameter)) {
    module.visit("", &mut |name, item| {
        if let Item::Parameter(parameter) = item {
            see(name, parameter);
        }
    });
}

fn each_mut<M: Module + ?Sized>(module: &mut M, mut see: impl FnMut(&str, &mut Parameter)) {
    module.visit_mut("", &mut |name, item| {
        if let ItemMut::Parameter(parameter) = item {
            see(name, parameter);
        }
    });
}

/// All parameters with their names, in the order of the tree.
pub fn parameters<M: Module + ?Sized>(module: &M) -> Vec<(String, Array)> {
    filter_map(module, |name, parameter| Some((name.to_string(), parameter.array().clone())))
}

/// The parameters that learn, with their names.
pub fn trainable_parameters<M: Module + ?Sized>(module: &M) -> Vec<(String, Array)> {
    filter_map(module, |name, parameter| {
        (parameter.role() == Role::Trained).then(|| (name.to_string(), parameter.array().clone()))
    })
}

/// What `f` makes of the parameters, where it makes something.
pub fn filter_map<M: Module + ?Sized, R>(
    module: &M,
    mut f: impl FnMut(&str, &Parameter) -> Option<R>,
) -> Vec<R> {
    let mut list = Vec::new();
    each(module, |name, parameter| list.extend(f(name, parameter)));
    list
}

/// Replaces parameters by name.
///
/// # Errors
/// If a name does not exist in the module, or a shape differs. Nothing is replaced then.
pub fn set_parameters<M: Module + ?Sized>(module: &mut M, values: &[(String, Array)]) -> Result<()> {
    put(module, values, "set_parameters", true, false)
}

/// Takes what a file holds: as [`set_parameters`], and if `strict`, every parameter must be there.
/// If not, names that the module lacks are passed over, as is what is missing.
///
/// # Errors
/// As said, and if a shape differs. Nothing is replaced then.
pub fn load_parameters<M: Module + ?Sized>(
    module: &mut M,
    values: &[(String, Array)],
    strict: bool,
) -> Result<()> {
    put(module, values, "load_parameters", strict, strict)
}

fn put<M: Module + ?Sized>(
    module: &mut M,
    values: &[(String, Array)],
    op: &'static str,
    all_known: bool,
    all_given: bool,
) -> Result<()> {
    let given: HashMap<&str, &Array> = values.iter().map(|(name, array)| (name.as_str(), array)).collect();
    let mut unknown: Vec<&str> = given.keys().copied().collect();
    let (mut missing, mut mismatch) = (Vec::new(), None);
    each(module, |name, parameter| {
        unknown.retain(|other| *other != name);
        match given.get(name) {
            None => missing.push(name.to_string()),
            Some(value) if value.shape() != parameter.shape() => {
                let (shape, got) = (parameter.shape(), value.shape());
                mismatch.get_or_insert(format!("{name} has the shape {shape:?}, got {got:?}"));
            }
            Some(_) => {}
        }
    });
    unknown.sort_unstable();
    if all_known && !unknown.is_empty() {
        return Err(invalid(op, format!("there is no parameter {}", unknown.join(", "))));
    }
    if all_given && !missing.is_empty() {
        return Err(invalid(op, format!("nothing is given for {}", missing.join(", "))));
    }
    if let Some(message) = mismatch {
        return Err(invalid(op, message));
    }
    each_mut(module, |name, parameter| {
        if let Some(value) = given.get(name) {
            parameter.set((*value).clone());
        }
    });
    Ok(())
}

/// Replaces every parameter by what `f` makes of it; nothing, if `f` fails.
pub fn apply<M: Module + ?Sized>(
    module: &mut M,
    mut f: impl FnMut(&str, &Parameter) -> Result<Array>,
) -> Result<()> {
    let mut made = filter_map(module, |name, parameter| Some(f(name, parameter)))
        .into_iter()
        .collect::<Result<Vec<Array>>>()?
        .into_iter();
    each_mut(module, |_, parameter| parameter.set(made.next().expect("one was made of each")));
    Ok(())
}

/// Casts the parameters whose dtype `which` picks; MLX's default is every float.
pub fn set_dtype<M: Module + ?Sized>(
    module: &mut M,
    dtype: Dtype,
    which: impl Fn(Dtype) -> bool,
) -> Result<()> {
    apply(module, |_, parameter| {
        if which(parameter.dtype()) { parameter.astype(dtype) } else { Ok(parameter.array().clone()) }
    })
}

/// Which parameters to freeze. The default is all of them.
#[derive(Clone, Copy, Debug)]
pub struct Which<'a> {
    /// Names of parameters or modules within their module, as `bias` or `self_attn`. None: all.
    pub keys: &'a [&'a str],
    /// In modules within modules too.
    pub recurse: bool,
    /// A key that nothing is called is an error.
    pub strict: bool,
}

impl Default for Which<'_> {
    fn default() -> Self {
        Which { keys: &[], recurse: true, strict: false }
    }
}

/// Stops parameters from learning.
///
/// # Errors
/// If `which` is strict and nothing has the name of a key.
pub fn freeze<M: Module + ?Sized>(module: &mut M, which: Which<'_>) -> Result<()> {
    change_role("freeze", module, which, Parameter::freeze)
}

/// Lets parameters learn again; [`Role::State`] stays what it is.
///
/// # Errors
/// If `which` is strict and nothing has the name of a key.
pub fn unfreeze<M: Module + ?Sized>(module: &mut M, which: Which<'_>) -> Result<()> {
    change_role("unfreeze", module, which, Parameter::unfreeze)
}

fn change_role<M: Module + ?Sized>(
    op: &'static str,
    module: &mut M,
    which: Which<'_>,
    change: impl Fn(&mut Parameter),
) -> Result<()> {
    let below = if which.recurse { Vec::new() } else { children(module) };
    let mut found = vec![false; which.keys.len()];
    let mut chosen = |name: &str| {
        let own = |key: &str| name == key || name.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        let any = |key: &str| {
            let mut starts = std::iter::once(0)
                .chain(name.match_indices('.').map(|(dot, _)| dot + 1))
                .map(|at| &name[at..]);
            starts.any(|rest| rest == key || rest.strip_prefix(key).is_some_and(|r| r.starts_with('.')))
        };
        if which.keys.is_empty() {
            return which.recurse || !below.iter().any(|(child, _)| own(child));
        }
        let mut hit = false;
        for (found, &key) in found.iter_mut().zip(which.keys) {
            let is = if which.recurse { any(key) } else { own(key) };
            *found |= is;
            hit |= is;
        }
        hit
    };
    let mut hits = filter_map(module, |name, _| Some(chosen(name))).into_iter();
    if let (true, Some(index)) = (which.strict, found.iter().position(|found| !found)) {
        return Err(invalid(op, format!("nothing in the module is called {}", which.keys[index])));
    }
    each_mut(module, |_, parameter| {
        if hits.next() == Some(true) {
            change(parameter);
        }
    });
    Ok(())
}

/// All modules of a tree with their names and kinds, each before what is in it; the root is "".
pub fn named_modules<M: Module + ?Sized>(module: &M) -> Vec<(String, &'static str)> {
    let mut list = Vec::new();
    module.visit("", &mut |name, item| {
        if let Item::Module(module) = item {
            list.push((name.to_string(), module.kind()));
        }
    });
    list
}

/// The modules right below the root, with their names and kinds.
pub fn children<M: Module + ?Sized>(module: &M) -> Vec<(String, &'static str)> {
    let mut list: Vec<(String, &'static str)> = Vec::new();
    for (name, kind) in named_modules(module) {
        let within = |(outer, _): &(String, &str)| {
            name.strip_prefix(outer.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        if !name.is_empty() && !list.last().is_some_and(within) {
            list.push((name, kind));
        }
    }
    list
}

/// The modules that hold no others, with their names and kinds.
pub fn leaf_modules<M: Module + ?Sized>(module: &M) -> Vec<(String, &'static str)> {
    let all = named_modules(module);
    let holds = |outer: &str, name: &str| {
        outer.is_empty() && !name.is_empty()
            || name.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'))
    };
    let is_leaf = |(name, _): &&(String, &str)| !all.iter().any(|(other, _)| holds(name, other));
    all.iter().filter(is_leaf).cloned().collect()
}

/// Lends every module of a tree to `f`, by name, each before what is in it.
///
/// ```
/// use mica_nn::*;
///
/// let keys = &mut Keys::new(0)?;
/// let mut model = MultiHeadAttention::new(8, 2, true, keys)?;
/// // Train the output alone.
/// freeze(&mut model, Which::default())?;
/// apply_to_modules(&mut model, |name, module| match name {
///     "out_proj" => unfreeze(module, Which::default()),
///     _ => Ok(()),
/// })?;
/// assert_eq!(trainable_parameters(&model).len(), 2);
/// # Ok::<(), mica_array::Error>(())
/// ```
///
/// # Errors
/// The first of `f`, which is not called any more after it.
pub fn apply_to_modules<M: Module + ?Sized>(
    module: &mut M,
    mut f: impl FnMut(&str, &mut dyn Module) -> Result<()>,
) -> Result<()> {
    let mut result = Ok(());
    module.visit_mut("", &mut |name, item| {
        if let (ItemMut::Module(module), Ok(())) = (item, &result) {
            result = f(name, module);
        }
    });
    result
}

/// Puts other layers in the place of boxed ones, by name: those of a [`Sequential`](crate::Sequential)
/// and of fields that are a `Box<dyn Layer>`. A field of a type of its own is assigned to instead.
///
/// # Errors
/// If `strict`, and a name is not that of a boxed layer, or given twice. Nothing is replaced then.
pub fn update_modules<M: Module + ?Sized>(
    module: &mut M,
    layers: Vec<(String, Box<dyn Layer>)>,
    strict: bool,
) -> Result<()> {
    let mut places = Vec::new();
    module.visit_mut("", &mut |name, item| {
        if let ItemMut::Layer(_) = item {
            places.push(name.to_string());
        }
    });
    let mut given = HashMap::new();
    for (name, layer) in layers {
        if strict && !places.contains(&name) {
            let message = format!("there is no boxed layer {name:?}, those there are: {}", places.join(", "));
            return Err(invalid("update_modules", message));
        }
        if let Some((name, _)) = given.remove_entry(&name).filter(|_| strict) {
            return Err(invalid("update_modules", format!("{name} is given twice")));
        }
        given.insert(name, layer);
    }
    module.visit_mut("", &mut |name, item| {
        if let ItemMut::Layer(place) = item
            && let Some(layer) = given.remove(name)
        {
            *place = layer;
        }
    });
    Ok(())
}

/// Quantizes the weights of layers that can be: [`Linear`](crate::Linear) and
/// [`Embedding`](crate::Embedding).
///
/// `choose` is asked for each of them, by name, and says how; `None` leaves it alone. To quantize
/// all in one way, `|_, _| Some(format)`. The weights are packed where they stand, and
/// frozen.
///
/// # Errors
/// If a format does not fit a weight; those before it are quantized then.
pub fn quantize<M: Module + ?Sized>(
    module: &mut M,
    mut choose: impl FnMut(&str, &dyn Module) -> Option<QuantSpec>,
) -> Result<()> {
    let mut result = Ok(());
    module.visit_mut("", &mut |name, item| {
        if let ItemMut::Module(module) = item
            && result.is_ok()
            && module.can_quantize()
            && let Some(format) = choose(name, module)
        {
            result = module.quantize(format);
        }
    });
    result
}
