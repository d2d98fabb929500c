//! The Python literal in a `.npy` header: just the one dictionary that NumPy writes.

/// The three entries of the dictionary.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Description {
    pub descr: String,
    pub fortran_order: bool,
    pub shape: Vec<usize>,
}

/// Reads `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`. All three keys must be
/// there, once, in any order, and no other.
pub(super) fn parse(text: &[u8]) -> Result<Description, String> {
    let mut reader = Reader { text, at: 0 };
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    reader.expect(b'{')?;
    while !reader.accept(b'}') {
        let key = reader.string()?;
        reader.expect(b':')?;
        let fresh = match key.as_str() {
            "descr" => descr.replace(reader.string()?).is_none(),
            "fortran_order" => fortran_order.replace(reader.boolean()?).is_none(),
            "shape" => shape.replace(reader.tuple()?).is_none(),
            _ => return Err(format!("header has an unknown key {key:?}")),
        };
        if !fresh {
            return Err(format!("header has {key:?} twice"));
        }
        if !reader.accept(b',') {
            reader.expect(b'}')?;
            break;
        }
    }
    if reader.next().is_some() {
        return Err(reader.unexpected("the end"));
    }
    match (descr, fortran_order, shape) {
        (Some(descr), Some(fortran_order), Some(shape)) => Ok(Description { descr, fortran_order, shape }),
        _ => Err("header lacks one of 'descr', 'fortran_order' and 'shape'".to_owned()),
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    /// The next byte that is not white space, without taking it.
    fn next(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let found = self.next() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), String> {
        if self.accept(byte) { Ok(()) } else { Err(self.unexpected(&format!("{:?}", byte as char))) }
    }

    fn unexpected(&self, expected: &str) -> String {
        match self.text.get(self.at) {
            Some(&byte) => {
                format!("header: expected {expected} at character {}, found {:?}", self.at, byte as char)
            }
            None => format!("header: expected {expected}, but it ends"),
        }
    }

    /// A text in single or double quotes, without escapes.
    fn string(&mut self) -> Result<String, String> {
        let Some(quote @ (b'\'' | b'"')) = self.next() else {
            return Err(self.unexpected("a text in quotes"));
        };
        let start = self.at + 1;
        let len = self.text[start..].iter().position(|&b| b == quote || b == b'\\');
        match len {
            Some(len) if self.text[start + len] == quote => {
                self.at = start + len + 1;
                Ok(String::from_utf8_lossy(&self.text[start..start + len]).into_owned())
            }
            _ => Err(self.unexpected("a text without escapes that ends")),
        }
    }

    fn boolean(&mut self) -> Result<bool, String> {
        self.next();
        for (word, value) in [("True", true), ("False", false)] {
            if self.text[self.at..].starts_with(word.as_bytes()) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.unexpected("True or False"))
    }

    /// `()`, `(3,)`, `(3, 4)`.
    fn tuple(&mut self) -> Result<Vec<usize>, String> {
        self.expect(b'(')?;
        let mut values = Vec::new();
        while !self.accept(b')') {
            values.push(self.integer()?);
            if !self.accept(b',') {
                self.expect(b')')?;
                break;
            }
        }
        Ok(values)
    }

    fn integer(&mut self) -> Result<usize, String> {
        self.next();
        let digits = self.text[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        let text = std::str::from_utf8(&self.text[self.at..self.at + digits]).expect("digits");
        let value = text.parse().map_err(|_| self.unexpected("a number of 64 bits"))?;
        self.at += digits;
        // Python 2 wrote long integers as 3L.
        self.at += usize::from(self.text.get(self.at) == Some(&b'L'));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted() {
        let description = |shape: &[usize]| Description {
            descr: "<f4".to_owned(),
            fortran_order: false,
            shape: shape.to_vec(),
        };
        let cases: &[(&str, &[usize])] = &[
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }     \n", &[2, 3]),
            ("{'descr':'<f4','fortran_order':False,'shape':(2,3)}", &[2, 3]),
            (" {\"shape\": (3,), \"descr\": \"<f4\", \"fortran_order\": False}", &[3]),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (), }", &[]),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 4L), }", &[3, 4]),
        ];
        for (text, shape) in cases {
            assert_eq!(parse(text.as_bytes()).as_ref(), Ok(&description(shape)), "{text}");
        }
    }

    #[test]
    fn refused() {
        let cases = [
            "",
            "{",
            "{}",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} x",
            "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2 3)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': [2]}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,",
            "{'descr': '<f4, 'fortran_order': False, 'shape': (2,)}",
            "{'descr': '\\x3cf4', 'fortran_order': False, 'shape': (2,)}",
            "{'descr",
            "__import__('os')",
        ];
        for text in cases {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
