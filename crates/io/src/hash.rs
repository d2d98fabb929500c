//! SHA-256: naming content, and noticing when it has changed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::Digest;

use crate::{Error, Result};

/// A running SHA-256. As a [`Write`] it hashes what is written and never fails.
#[derive(Clone, Debug, Default)]
pub struct Sha256(sha2::Sha256);

impl Sha256 {
    /// The state before the first byte.
    pub fn new() -> Sha256 {
        Sha256::default()
    }

    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of everything taken in, as 64 lower-case hexadecimal digits.
    pub fn finish(self) -> String {
        let mut out = String::with_capacity(64);
        for byte in self.0.finalize() {
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from(b"0123456789abcdef"[digit as usize]));
            }
        }
        out
    }
}

impl Write for Sha256 {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The hash of `bytes`, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    hash.finish()
}

/// The hash of a file's content, in hexadecimal, read in pieces of 1 MiB.
pub fn sha256_file(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hash.finish()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path, e)),
        }
    }
}

/// Fails with [`Error::Integrity`] unless the file's hash is `expected` (hexadecimal, either case).
pub fn verify(path: impl AsRef<Path>, expected: &str) -> Result<()> {
    let actual = sha256_file(&path)?;
    if actual.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(Error::Integrity { path: path.as_ref().to_owned(), expected: expected.to_owned(), actual })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    // From FIPS 180-4's examples.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn known_answers() {
        assert_eq!(sha256(b"abc"), ABC);
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn files_and_pieces_hash_like_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i * 7 + i / 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut pieces = Sha256::new();
        for piece in bytes.chunks(777) {
            pieces.write_all(piece).unwrap();
        }
        let whole = sha256(&bytes);
        assert_eq!(pieces.finish(), whole);
        assert_eq!(sha256_file(&path).unwrap(), whole);
        verify(&path, &whole.to_uppercase()).unwrap();
        let error = verify(&path, ABC).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Integrity);
        assert!(error.to_string().contains(&whole), "{error}");
    }
}
