//! Values of the metadata.

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The types are named by themselves.
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Applies `$body` to the payload of any variant of `$enum`.
macro_rules! each {
    ($enum:ident, $value:expr, $payload:ident => $body:expr) => {
        match $value {
            $enum::U8($payload) => $body,
            $enum::I8($payload) => $body,
            $enum::U16($payload) => $body,
            $enum::I16($payload) => $body,
            $enum::U32($payload) => $body,
            $enum::I32($payload) => $body,
            $enum::F32($payload) => $body,
            $enum::Bool($payload) => $body,
            $enum::String($payload) => $body,
            $enum::Array($payload) => $body,
            $enum::U64($payload) => $body,
            $enum::I64($payload) => $body,
            $enum::F64($payload) => $body,
        }
    };
}

impl Value {
    /// Any integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        u64::try_from(self.as_i128()?).ok()
    }

    /// Any integer that fits.
    pub fn as_i64(&self) -> Option<i64> {
        i64::try_from(self.as_i128()?).ok()
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => self.as_i128().map(|v| v as f64),
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(v) = self { Some(*v) } else { None }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(v) = self { Some(v) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Value::Array(v) = self { Some(v) } else { None }
    }

    fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// The number of the value's type in files.
    pub(super) fn type_number(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => 9,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// Appends the value as files hold it, without its type.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        each!(Value, self, v => v.encode(out));
    }
}

impl Array {
    /// Number of values.
    pub fn len(&self) -> usize {
        each!(Array, self, v => v.len())
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The texts of an array of texts.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Array::String(v) = self { Some(v) } else { None }
    }

    /// The values of an array of integers, if all fit.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        match self {
            Array::U8(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::I8(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::U16(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::I16(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::U32(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::I32(v) => Some(v.iter().map(|&v| v.into()).collect()),
            Array::U64(v) => v.iter().map(|&v| v.try_into().ok()).collect(),
            Array::I64(v) => Some(v.clone()),
            _ => None,
        }
    }

    /// The values of an array of floats, rounded to f32.
    pub fn to_f32s(&self) -> Option<Vec<f32>> {
        match self {
            Array::F32(v) => Some(v.clone()),
            Array::F64(v) => Some(v.iter().map(|&v| v as f32).collect()),
            _ => None,
        }
    }

    fn type_number(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::String(_) => 8,
            Array::Array(_) => 9,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }
}

/// How a value looks in a file.
trait Encode {
    fn encode(&self, out: &mut Vec<u8>);
}

macro_rules! encode_numbers {
    ($($number:ty)*) => {$(
        impl Encode for $number {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
encode_numbers!(u8 i8 u16 i16 u32 i32 f32 u64 i64 f64);

impl Encode for bool {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Encode for String {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_text(self, out);
    }
}

impl Encode for Array {
    fn encode(&self, out: &mut Vec<u8>) {
        self.type_number().encode(out);
        each!(Array, self, values => {
            (values.len() as u64).encode(out);
            values.iter().for_each(|v| v.encode(out));
        });
    }
}

/// Appends a text: its length and its bytes.
pub(super) fn encode_text(text: &str, out: &mut Vec<u8>) {
    (text.len() as u64).encode(out);
    out.extend_from_slice(text.as_bytes());
}

macro_rules! from {
    ($($variant:ident $payload:ty),*) => {$(
        impl From<$payload> for Value {
            fn from(v: $payload) -> Value {
                Value::$variant(v)
            }
        }
        impl From<Vec<$payload>> for Value {
            fn from(v: Vec<$payload>) -> Value {
                Value::Array(Array::$variant(v))
            }
        }
    )*};
}
from!(
    U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, F32 f32, Bool bool, String String, U64 u64, I64 i64,
    F64 f64
);

impl From<&str> for Value {
    fn from(v: &str) -> Value {
        Value::String(v.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_type_are_read_as_asked() {
        let cases = [
            (Value::U8(200), Some(200), Some(200), Some(200.0)),
            (Value::I32(-1), None, Some(-1), Some(-1.0)),
            (Value::U64(u64::MAX), Some(u64::MAX), None, Some(u64::MAX as f64)),
            (Value::F32(0.5), None, None, Some(0.5)),
            (Value::F64(2.0), None, None, Some(2.0)),
            (Value::Bool(true), None, None, None),
            (Value::from("7"), None, None, None),
        ];
        for (value, unsigned, signed, float) in cases {
            assert_eq!(value.as_u64(), unsigned, "{value:?}");
            assert_eq!(value.as_i64(), signed, "{value:?}");
            assert_eq!(value.as_f64(), float, "{value:?}");
        }
        assert_eq!(Array::U64(vec![1, u64::MAX]).to_i64s(), None);
        assert_eq!(Array::I8(vec![-1]).to_i64s(), Some(vec![-1]));
        assert_eq!(Array::F64(vec![0.5]).to_f32s(), Some(vec![0.5]));
        assert_eq!(Array::Bool(vec![]).to_i64s(), None);
    }
}
