//! What a module holds: an array, and whether it learns.

use std::ops::Deref;

use mica_array::{Array, Dtype, Operand};

/// Whether a parameter changes in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Role {
    /// Gets a gradient.
    #[default]
    Trained,
    /// Gets none until it is unfrozen.
    Frozen,
    /// Never gets one: running statistics, quantized codes. Saved and loaded like the others.
    State,
}

/// A named array of a module. It reads as the array that it holds.
#[derive(Clone, Debug)]
pub struct Parameter {
    array: Array,
    role: Role,
}

impl Parameter {
    /// In the role that it says.
    pub fn new(array: Array, role: Role) -> Parameter {
        Parameter { array, role }
    }

    /// The array.
    pub fn array(&self) -> &Array {
        &self.array
    }

    /// Another array in the same role.
    pub fn set(&mut self, array: Array) {
        self.array = array;
    }

    /// Whether it learns.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Stops learning.
    pub fn freeze(&mut self) {
        if self.role == Role::Trained {
            self.role = Role::Frozen;
        }
    }

    /// Learns again; what is no more than state never does.
    pub fn unfreeze(&mut self) {
        if self.role == Role::Frozen {
            self.role = Role::Trained;
        }
    }
}

impl From<Array> for Parameter {
    fn from(array: Array) -> Parameter {
        Parameter { array, role: Role::Trained }
    }
}

impl Deref for Parameter {
    type Target = Array;

    fn deref(&self) -> &Array {
        &self.array
    }
}

impl Operand for Parameter {
    fn operand(&self, other: Dtype) -> Array {
        self.array.operand(other)
    }
}
