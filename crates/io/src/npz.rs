//! NumPy's archive of named arrays: a ZIP file of `.npy` files.
//!
//! Reads and writes stored and deflated arrays (`np.savez`, `np.savez_compressed`).

use std::path::Path;

use crate::atomic::{self, AtomicFile};
use crate::npy::{self, Npy};
use crate::zip::{Archive, ArchiveWriter};
use crate::{DType, Error, Result};

/// An open archive. Arrays are read on request, from any number of threads.
#[derive(Debug)]
pub struct Npz(Archive);

impl Npz {
    /// Opens an archive and checks its directory.
    pub fn open(path: impl AsRef<Path>) -> Result<Npz> {
        Ok(Npz(Archive::open(path.as_ref())?))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The names of the arrays, in the order of the file. Entries that are no arrays are passed
    /// over.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.names().filter_map(|name| name.strip_suffix(".npy"))
    }

    /// The array called `name`.
    pub fn read(&self, name: &str) -> Result<Npy> {
        let content = self.0.read(&format!("{name}.npy"))?;
        npy::parse_vec(content)
            .map_err(|what| Error::bad_data(self.path(), format!("array {name:?}: {what}")))
    }
}

/// An array to be written: name, type, shape, and elements, row-major and little-endian.
pub type Named<'a> = (&'a str, DType, &'a [usize], &'a [u8]);

/// Writes an archive of these arrays, stored, or deflated if `compress`.
///
/// # Errors
/// [`Error::Invalid`] for types that NumPy has no name for, sizes that do not fit, and equal names.
pub fn write(path: impl AsRef<Path>, arrays: &[Named], compress: bool) -> Result<()> {
    let path = path.as_ref();
    let mut names = std::collections::HashSet::new();
    let mut headers = Vec::with_capacity(arrays.len());
    for &(name, dtype, shape, bytes) in arrays {
        let problem = |what: String| Error::invalid(path, format!("array {name:?}: {what}"));
        if !names.insert(name) || name.len() > 60_000 {
            return Err(problem("is given twice, or has a name too long for the format".to_owned()));
        }
        headers.push(npy::header_for(dtype, shape, bytes.len()).map_err(problem)?);
    }
    atomic::write_with(path, |file: &mut AtomicFile| {
        let mut archive = ArchiveWriter::new(file);
        for (&(name, _, _, bytes), header) in arrays.iter().zip(&headers) {
            archive.add(&format!("{name}.npy"), &[header, bytes], compress)?;
        }
        archive.finish().map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn sample(compress: bool) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        let arrays: [Named; 3] = [
            ("a", DType::F32, &[2], &[1, 2, 3, 4, 5, 6, 7, 8]),
            ("é/b", DType::U8, &[0], &[]),
            ("c", DType::Bool, &[], &[1]),
        ];
        write(&path, &arrays, compress).unwrap();
        (folder, path)
    }

    #[test]
    fn what_is_written_reads_back() {
        for compress in [false, true] {
            let (_folder, path) = sample(compress);
            let file = Npz::open(&path).unwrap();
            assert_eq!(file.names().collect::<Vec<_>>(), ["a", "é/b", "c"]);
            let a = file.read("a").unwrap();
            assert_eq!(a, Npy { dtype: DType::F32, shape: vec![2], bytes: (1..9).collect() });
            assert_eq!(file.read("é/b").unwrap().shape, [0]);
            assert_eq!(file.read("c").unwrap().bytes, [1]);
            assert_eq!(file.read("d").unwrap_err().kind(), ErrorKind::NotFound);
            write(&path, &[], compress).unwrap();
            assert_eq!(Npz::open(&path).unwrap().names().count(), 0);
        }
    }

    #[test]
    fn compressed_zeros_are_small() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("zeros.npz");
        write(&path, &[("z", DType::U8, &[100_000], &[0; 100_000])], true).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 1000);
        assert_eq!(Npz::open(&path).unwrap().read("z").unwrap().bytes, [0; 100_000]);
    }

    #[test]
    fn mistakes_leave_the_file_that_was_there() {
        let (_folder, path) = sample(false);
        let before = std::fs::read(&path).unwrap();
        let cases: [(&str, &[Named]); 3] = [
            ("equal names", &[("a", DType::U8, &[1], &[1]), ("a", DType::U8, &[1], &[1])]),
            ("too few bytes", &[("a", DType::U8, &[2], &[1])]),
            ("no name for the type", &[("a", DType::BF16, &[1], &[1, 2])]),
        ];
        for (name, arrays) in cases {
            assert!(matches!(write(&path, arrays, false), Err(Error::Invalid { .. })), "{name}");
            assert_eq!(std::fs::read(&path).unwrap(), before, "{name}");
        }
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_noticed_or_harmless() {
        for compress in [false, true] {
            let (folder, path) = sample(compress);
            let whole = std::fs::read(&path).unwrap();
            let expected = Npz::open(&path).unwrap().read("a").unwrap();
            let damaged = folder.path().join("damaged.npz");
            let check = |content: &[u8]| {
                let _ = std::fs::remove_file(&damaged);
                std::fs::write(&damaged, content).unwrap();
                let Ok(file) = Npz::open(&damaged) else { return };
                for name in file.names() {
                    // The checksum covers the header of the array as well as its data.
                    if let Ok(array) = file.read(name)
                        && name == "a"
                    {
                        assert_eq!(array, expected);
                    }
                }
            };
            for len in 0..whole.len() {
                check(&whole[..len]);
            }
            for i in 0..whole.len() {
                for bit in [0, 3, 7] {
                    let mut content = whole.clone();
                    content[i] ^= 1 << bit;
                    check(&content);
                }
                for value in [0, 0x7f, 0xff] {
                    let mut content = whole.clone();
                    content[i] = value;
                    check(&content);
                }
            }
        }
    }
}
