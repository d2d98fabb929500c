//! The module tree: parameters and modules by name.

use mica_array::quantized::QuantSpec;
use mica_array::{Error, Result};

use crate::{Layer, Parameter};

/// What a walk over a module comes by.
pub enum Item<'a> {
    /// A parameter.
    Parameter(&'a Parameter),
    /// A module, before what is in it.
    Module(&'a dyn Module),
}

/// What a walk over a module comes by, to be changed.
pub enum ItemMut<'a> {
    /// A parameter.
    Parameter(&'a mut Parameter),
    /// A module, before what is in it.
    Module(&'a mut dyn Module),
    /// A boxed layer, before it is shown as a module: another may be put in its place, and the
    /// walk goes on with that one.
    Layer(&'a mut Box<dyn Layer>),
}

/// Something with named parameters.
///
/// Names are joined with dots, as in `model.layers.0.self_attn.q_proj.weight`; list items are
/// their index. [`module!`](crate::module!) writes the implementation of a struct, and the
/// functions of this crate ([`parameters`](crate::parameters()), [`freeze`](crate::freeze()),
/// [`quantize`](crate::quantize()) and so on) are what is done with a tree.
pub trait Module {
    /// Shows itself and everything in it, with full names.
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>));

    /// Lends itself and everything in it, with full names.
    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>));

    /// What it is, as `Linear`: the name of its type.
    fn kind(&self) -> &'static str {
        let path = std::any::type_name::<Self>();
        let plain = path.split('<').next().unwrap_or(path);
        plain.rsplit("::").next().unwrap_or(plain)
    }

    /// Whether [`Module::quantize`] works.
    fn can_quantize(&self) -> bool {
        false
    }

    /// Replaces its own weight by a quantized one.
    ///
    /// # Errors
    /// If it has none that can be quantized, or the format does not fit its shape.
    fn quantize(&mut self, _: QuantSpec) -> Result<()> {
        let message = format!("a module of type {} has no weight that can be quantized", self.kind());
        Err(Error::Unsupported { op: "quantize", message: message.into() })
    }
}

/// `name.field`, or `field` at the root.
pub fn join(name: &str, field: &str) -> String {
    match (name.is_empty(), field.is_empty()) {
        (true, _) => field.to_string(),
        (_, true) => name.to_string(),
        _ => format!("{name}.{field}"),
    }
}

impl Module for Parameter {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        see(name, Item::Parameter(self));
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        see(name, ItemMut::Parameter(self));
    }
}

impl<M: Module> Module for Option<M> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        if let Some(module) = self {
            module.visit(name, see);
        }
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        if let Some(module) = self {
            module.visit_mut(name, see);
        }
    }
}

macro_rules! boxed_module {
    ($type:ty, [$($bound:tt)*], $slot:expr) => {
        impl<$($bound)*> Module for $type {
            fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
                (**self).visit(name, see);
            }

            fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
                $slot(self, name, see);
                (**self).visit_mut(name, see);
            }

            fn kind(&self) -> &'static str {
                (**self).kind()
            }

            fn can_quantize(&self) -> bool {
                (**self).can_quantize()
            }

            fn quantize(&mut self, format: QuantSpec) -> Result<()> {
                (**self).quantize(format)
            }
        }
    };
}

/// What a walk that changes things is called with.
type See<'a> = &'a mut dyn FnMut(&str, ItemMut<'_>);

boxed_module!(Box<M>, [M: Module], |_: &mut Box<M>, _: &str, _: See| {});
boxed_module!(Box<dyn Module>, [], |_: &mut Box<dyn Module>, _: &str, _: See| {});
boxed_module!(Box<dyn Layer>, [], |layer: &mut Box<dyn Layer>, name: &str, see: See| {
    see(name, ItemMut::Layer(layer))
});

impl<M: Module> Module for Vec<M> {
    fn visit(&self, name: &str, see: &mut dyn FnMut(&str, Item<'_>)) {
        for (index, module) in self.iter().enumerate() {
            module.visit(&join(name, &index.to_string()), see);
        }
    }

    fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, ItemMut<'_>)) {
        for (index, module) in self.iter_mut().enumerate() {
            module.visit_mut(&join(name, &index.to_string()), see);
        }
    }
}

/// Writes [`Module`] for a struct: the fields that hold parameters or modules, with the name each
/// has in files where it differs (`""` for a field whose own fields stand at this level).
///
/// ```
/// use mica_nn::{Linear, Parameter};
/// struct Scaled { scale: Parameter, inner: Linear, times: f32 }
/// mica_nn::module!(Scaled { scale, inner as "proj" });
/// ```
#[macro_export]
macro_rules! module {
    ($type:ty { $($field:ident $(as $name:literal)?),* $(,)? } $($own:tt)*) => {
        impl $crate::Module for $type {
            fn visit(&self, name: &str, see: &mut dyn FnMut(&str, $crate::Item<'_>)) {
                see(name, $crate::Item::Module(self));
                $( $crate::Module::visit(&self.$field, &$crate::join(name, $crate::module!(@name $field $($name)?)), see); )*
            }

            fn visit_mut(&mut self, name: &str, see: &mut dyn FnMut(&str, $crate::ItemMut<'_>)) {
                see(name, $crate::ItemMut::Module(self));
                $( $crate::Module::visit_mut(&mut self.$field, &$crate::join(name, $crate::module!(@name $field $($name)?)), see); )*
            }

            $($own)*
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
}
