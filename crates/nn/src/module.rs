//! The module tree: parameters by name.

use mica_array::{Array, Error, Result};

/// Something with named parameters.
///
/// Names are joined with dots, as in `model.layers.0.self_attn.q_proj.weight`; list items are
/// their index. [`module!`](crate::module) writes the implementation of a struct.
pub trait Module {
    /// Shows every parameter with its full name.
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &Array));

    /// Lends every parameter with its full name.
    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut Array));
}

/// `name.field`, or `field` at the root.
pub fn join(name: &str, field: &str) -> String {
    match (name.is_empty(), field.is_empty()) {
        (true, _) => field.to_string(),
        (_, true) => name.to_string(),
        _ => format!("{name}.{field}"),
    }
}

impl Module for Array {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &Array)) {
        see(name, self);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut Array)) {
        see(name, self);
    }
}

impl<M: Module> Module for Option<M> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &Array)) {
        if let Some(module) = self {
            module.visit(name, see);
        }
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut Array)) {
        if let Some(module) = self {
            module.visit_mut(name, see);
        }
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &Array)) {
        (**self).visit(name, see);
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut Array)) {
        (**self).visit_mut(name, see);
    }
}

impl<M: Module> Module for Vec<M> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &Array)) {
        for (index, module) in self.iter().enumerate() {
            module.visit(&join(name, &index.to_string()), see);
        }
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut Array)) {
        for (index, module) in self.iter_mut().enumerate() {
            module.visit_mut(&join(name, &index.to_string()), see);
        }
    }
}

/// Writes [`Module`] for a struct: the fields that hold parameters or modules, with the name each
/// has in files where it differs (`""` for a field whose own fields stand at this level).
///
/// ```
/// use mica_array::Array;
/// struct Norm { weight: Array, eps: f32 }
/// mica_nn::module!(Norm { weight });
/// ```
#[macro_export]
macro_rules! module {
    ($type:ty { $($field:ident $(as $name:literal)?),* $(,)? }) => {
        impl $crate::Module for $type {
            fn visit(&self, name: &str, see: &mut dyn FnMut(&str, &mica_array::Array)) {
                $( $crate::Module::visit(&self.$field, &$crate::join(name, $crate::module!(@name $field $($name)?)), see); )*
            }

            fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, &mut mica_array::Array)) {
                $( $crate::Module::visit_mut(&mut self.$field, &$crate::join(name, $crate::module!(@name $field $($name)?)), see); )*
            }
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
}

/// All parameters with their names, in the order of the tree.
pub fn parameters<M: Module + ?Sized>(module: &M) -> Vec<(String, Array)> {
    let mut list = Vec::new();
    module.visit("", &mut |name, array| list.push((name.to_string(), array.clone())));
    list
}

/// Replaces parameters by name.
///
/// # Errors
/// If a name does not exist in the module, or a shape differs. Nothing is replaced then.
pub fn set_parameters<M: Module + ?Sized>(module: &mut M, values: &[(String, Array)]) -> Result<()> {
    let mut wanted: std::collections::HashMap<&str, &Array> =
        values.iter().map(|(name, array)| (name.as_str(), array)).collect();
    let mut mismatch = None;
    module.visit("", &mut |name, array| {
        if let Some(value) = wanted.get(name)
            && value.shape() != array.shape()
        {
            mismatch.get_or_insert(format!(
                "{name} has the shape {:?}, got {:?}",
                array.shape(),
                value.shape()
            ));
        }
        wanted.remove(name);
    });
    let unknown = wanted.keys().next().map(|name| format!("there is no parameter {name}"));
    if let Some(message) = unknown.or(mismatch) {
        return Err(Error::Invalid { op: "set_parameters", message: message.into() });
    }
    let wanted: std::collections::HashMap<&str, &Array> =
        values.iter().map(|(name, array)| (name.as_str(), array)).collect();
    module.visit_mut("", &mut |name, array| {
        if let Some(value) = wanted.get(name) {
            *array = (*value).clone();
        }
    });
    Ok(())
}
