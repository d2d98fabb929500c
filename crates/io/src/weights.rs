//! The weights of a model folder, whatever number of files they are in.
//!
//! [`WeightFiles`] finds them as Hugging Face's and MLX's tools leave them, and gives one lookup by
//! name. Which names a model wants, and what it does about names that are left over, is the model
//! loader's business. [`ShardedWriter`] writes such a folder.

mod index;
mod sharded;

use std::collections::{BTreeMap, btree_map};
use std::fs;
use std::path::{Path, PathBuf};

pub use sharded::{DEFAULT_MAX_SHARD, ShardedWriter};

use crate::safetensors::{SafeTensors, TensorInfo};
use crate::{DType, Error, Result};

/// The file that holds all weights, if there is one.
const SINGLE: &str = "model.safetensors";

/// The file that says which weight is in which shard.
const INDEX: &str = "model.safetensors.index.json";

/// All weights of a folder. Only headers are in memory; weights are read on request, from any
/// number of threads.
#[derive(Debug)]
pub struct WeightFiles {
    path: PathBuf,
    files: Vec<SafeTensors>,
    /// Name → number of the file, place in its list of tensors.
    by_name: BTreeMap<String, (usize, usize)>,
}

/// One weight: where it is and what it looks like.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    file: &'a SafeTensors,
    info: &'a TensorInfo,
}

impl WeightFiles {
    /// Opens the weights of a folder, or one safetensors file.
    ///
    /// In a folder, the first of these that exists: `model.safetensors`; the shards listed in
    /// `model.safetensors.index.json`; a complete set of shards `NAME-00001-of-0000N.safetensors`
    /// without an index; a single other `*.safetensors`.
    ///
    /// A tensor that is in a listed shard but not in the index is found like the others: hiding it
    /// would hide that the folder's files do not belong together.
    ///
    /// # Errors
    /// [`Error::Missing`] when there are no weights or shards are missing; [`Error::BadData`] for
    /// malformed files, a tensor that is not in the shard where the index has it, index entries that
    /// lead out of the folder, and a name in several files.
    pub fn open(path: impl AsRef<Path>) -> Result<WeightFiles> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        if metadata.is_file() {
            return WeightFiles::join(path, vec![SafeTensors::open(path)?], &BTreeMap::new());
        }
        let single = path.join(SINGLE);
        if exists(&single)? {
            return WeightFiles::join(path, vec![SafeTensors::open(single)?], &BTreeMap::new());
        }
        let index_path = path.join(INDEX);
        if exists(&index_path)? {
            return WeightFiles::open_index(path, &index_path);
        }
        WeightFiles::open_unnamed(path)
    }

    fn open_index(folder: &Path, index_path: &Path) -> Result<WeightFiles> {
        let index = index::read(index_path)?;
        let mut names: Vec<&String> = index.values().collect();
        names.sort();
        names.dedup();
        let mut missing = Vec::new();
        for name in &names {
            if !exists(&folder.join(name))? {
                missing.push(name.as_str());
            }
        }
        if !missing.is_empty() {
            let what = format!(
                "lacks {} of {} files listed in {INDEX}: {}; fetch the model again",
                missing.len(),
                names.len(),
                list(&missing)
            );
            return Err(Error::missing(folder, what));
        }
        let files =
            names.iter().map(|name| SafeTensors::open(folder.join(name))).collect::<Result<Vec<_>>>()?;
        let absent: Vec<String> = index
            .iter()
            .filter(|(tensor, file)| {
                let number = names.binary_search(file).expect("names are the index's values");
                files[number].get(tensor).is_none()
            })
            .map(|(tensor, file)| format!("{tensor:?} in {file}"))
            .collect();
        if !absent.is_empty() {
            let what = format!("lists tensors that are not in their file: {}", list(&absent));
            return Err(Error::bad_data(index_path, what));
        }
        WeightFiles::join(folder, files, &index)
    }

    /// A folder with neither of the two usual names.
    fn open_unnamed(folder: &Path) -> Result<WeightFiles> {
        let mut found = Vec::new();
        let mut pickles = Vec::new();
        let read = |e| Error::io("read", folder, e);
        for entry in fs::read_dir(folder).map_err(read)? {
            let name = entry.map_err(read)?.file_name().to_string_lossy().into_owned();
            // macOS leaves "._model.safetensors" beside what it copies.
            if name.starts_with('.') {
                continue;
            } else if name.ends_with(".safetensors") {
                found.push(name);
            } else if [".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end)) {
                pickles.push(name);
            }
        }
        found.sort();
        let open = |name: &String| SafeTensors::open(folder.join(name));
        if found.len() == 1 || index::is_complete_set(&found) {
            let files = found.iter().map(open).collect::<Result<Vec<_>>>()?;
            return WeightFiles::join(folder, files, &BTreeMap::new());
        }
        let mut what = format!("has no {SINGLE} and no {INDEX}");
        if !found.is_empty() {
            what += &format!(", and it is not clear which to take of {}", list(&found));
        }
        if !pickles.is_empty() {
            what += &format!(
                "; {} may be pickled weights, which can run code and are never read: get the model \
                 as safetensors",
                list(&pickles)
            );
        }
        Err(Error::missing(folder, what))
    }

    /// One lookup over several files. `index` decides where a name counts that is in several.
    fn join(path: &Path, files: Vec<SafeTensors>, index: &BTreeMap<String, String>) -> Result<WeightFiles> {
        let mut by_name = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (place, info) in file.tensors().iter().enumerate() {
                match by_name.entry(info.name().to_owned()) {
                    btree_map::Entry::Vacant(entry) => {
                        entry.insert((number, place));
                    }
                    btree_map::Entry::Occupied(mut entry) => match index.get(info.name()) {
                        Some(listed) if file.path().ends_with(listed) => {
                            entry.insert((number, place));
                        }
                        Some(_) => {}
                        None => {
                            let other = files[entry.get().0].path();
                            let what = format!("tensor {:?} is also in {}", info.name(), other.display());
                            return Err(Error::bad_data(file.path(), what));
                        }
                    },
                }
            }
        }
        Ok(WeightFiles { path: path.to_owned(), files, by_name })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[SafeTensors] {
        &self.files
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there are no weights.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Bytes of all weights together.
    pub fn byte_len(&self) -> u64 {
        self.iter().map(|weight| weight.byte_len() as u64).sum()
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// All weights, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = Weight<'_>> {
        self.by_name.values().map(|&place| self.at(place))
    }

    /// Whether there is a weight called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The weight called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<Weight<'_>> {
        self.by_name.get(name).map(|&place| self.at(place))
    }

    /// The weight called `name`, or an error that says it is missing.
    pub fn require(&self, name: &str) -> Result<Weight<'_>> {
        self.get(name).ok_or_else(|| Error::missing(&self.path, format!("has no weight {name:?}")))
    }

    /// All bytes of the weight called `name`.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.require(name)?.read()
    }

    /// A text of the files' metadata, e.g. `format`: from the first file that has it.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file.metadata().get(key)).map(String::as_str)
    }

    fn at(&self, (number, place): (usize, usize)) -> Weight<'_> {
        let file = &self.files[number];
        Weight { file, info: &file.tensors()[place] }
    }
}

impl<'a> Weight<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.info.name()
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.info.dtype()
    }

    /// Its dimensions, the slowest first.
    pub fn shape(&self) -> &'a [usize] {
        self.info.shape()
    }

    /// Number of bytes.
    pub fn byte_len(&self) -> usize {
        self.info.byte_len()
    }

    /// The file it is in.
    pub fn path(&self) -> &'a Path {
        self.file.path()
    }

    /// All its bytes: row-major, little-endian.
    pub fn read(&self) -> Result<Vec<u8>> {
        self.file.read(self.info.name())
    }

    /// All its bytes into `out`, which must be as long.
    pub fn read_into(&self, out: &mut [u8]) -> Result<()> {
        self.file.read_into(self.info, out)
    }

    /// Fills `out` with its bytes from byte `offset` on.
    pub fn read_range(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.file.read_range(self.info, offset, out)
    }
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|e| Error::io("open", path, e))
}

/// Up to eight names, and how many more.
fn list<S: AsRef<str>>(names: &[S]) -> String {
    let mut text = names.iter().take(8).map(|n| n.as_ref()).collect::<Vec<_>>().join(", ");
    if names.len() > 8 {
        text += &format!(" and {} more", names.len() - 8);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::safetensors::Writer;

    fn put(folder: &Path, file: &str, tensors: &[(&str, u8)]) {
        let bytes: Vec<[u8; 2]> = tensors.iter().map(|&(_, v)| [v, v]).collect();
        let mut writer = Writer::new();
        writer.metadata("format", file);
        for ((name, _), bytes) in tensors.iter().zip(&bytes) {
            writer.tensor(*name, DType::U8, &[2], bytes);
        }
        writer.write(folder.join(file)).unwrap();
    }

    fn put_index(folder: &Path, entries: &[(&str, &str)]) {
        let map: BTreeMap<_, _> = entries.iter().copied().collect();
        let index = serde_json::json!({"metadata": {"total_size": 4}, "weight_map": map});
        fs::write(folder.join(INDEX), index.to_string()).unwrap();
    }

    fn content(weights: &WeightFiles) -> Vec<(String, u8)> {
        weights.iter().map(|w| (w.name().to_owned(), w.read().unwrap()[0])).collect()
    }

    fn pairs(expected: &[(&str, u8)]) -> Vec<(String, u8)> {
        expected.iter().map(|&(n, v)| (n.to_owned(), v)).collect()
    }

    #[test]
    fn every_kind_of_folder_opens() {
        type Build = fn(&Path);
        let cases: &[(&str, Build, &[(&str, u8)])] = &[
            ("single", |f| put(f, SINGLE, &[("a", 1), ("b", 2)]), &[("a", 1), ("b", 2)]),
            (
                "single wins over an index",
                |f| {
                    put(f, SINGLE, &[("a", 1)]);
                    put_index(f, &[("a", "gone.safetensors")]);
                },
                &[("a", 1)],
            ),
            (
                "index",
                |f| {
                    put(f, "x.safetensors", &[("b", 2)]);
                    put(f, "y.safetensors", &[("a", 1), ("c", 3)]);
                    put(f, "unrelated.safetensors", &[("d", 4)]);
                    put_index(f, &[("a", "y.safetensors"), ("b", "x.safetensors"), ("c", "y.safetensors")]);
                },
                &[("a", 1), ("b", 2), ("c", 3)],
            ),
            (
                "index decides between two files and hides nothing",
                |f| {
                    put(f, "x.safetensors", &[("a", 1), ("b", 1), ("extra", 9)]);
                    put(f, "y.safetensors", &[("a", 2), ("b", 2)]);
                    put_index(f, &[("a", "y.safetensors"), ("b", "x.safetensors")]);
                },
                &[("a", 2), ("b", 1), ("extra", 9)],
            ),
            (
                "index into a folder below",
                |f| {
                    fs::create_dir(f.join("sub")).unwrap();
                    put(f, "sub/x.safetensors", &[("a", 1)]);
                    put_index(f, &[("a", "sub/x.safetensors")]);
                },
                &[("a", 1)],
            ),
            (
                "shards without an index",
                |f| {
                    put(f, "m-00001-of-00002.safetensors", &[("a", 1)]);
                    put(f, "m-00002-of-00002.safetensors", &[("b", 2)]);
                },
                &[("a", 1), ("b", 2)],
            ),
            (
                "one of another name",
                |f| {
                    put(f, "adapters.safetensors", &[("a", 1)]);
                    fs::write(f.join("._adapters.safetensors"), "what macOS leaves").unwrap();
                },
                &[("a", 1)],
            ),
        ];
        for (name, build, expected) in cases {
            let folder = tempfile::tempdir().unwrap();
            build(folder.path());
            let weights = WeightFiles::open(folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(content(&weights), pairs(expected), "{name}");
            assert_eq!(weights.len(), expected.len(), "{name}");
            assert_eq!(weights.byte_len(), 2 * expected.len() as u64, "{name}");
            assert!(weights.metadata("format").is_some(), "{name}");
        }
    }

    #[test]
    fn a_file_opens_too_and_parts_are_read() {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), "f.safetensors", &[("a", 7)]);
        let weights = WeightFiles::open(folder.path().join("f.safetensors")).unwrap();
        let a = weights.require("a").unwrap();
        assert_eq!((a.dtype(), a.shape(), a.byte_len()), (DType::U8, &[2][..], 2));
        let mut out = [0; 1];
        a.read_range(1, &mut out).unwrap();
        assert_eq!(out, [7]);
        let mut out = [0; 2];
        a.read_into(&mut out).unwrap();
        assert_eq!(out, [7, 7]);
        let error = weights.read("b").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("\"b\""), "{error}");
    }

    #[test]
    fn folders_that_do_not_open() {
        type Build = fn(&Path);
        let cases: &[(&str, ErrorKind, &str, Build)] = &[
            ("empty", ErrorKind::NotFound, "has no model.safetensors", |_| {}),
            ("pickles", ErrorKind::NotFound, "pytorch_model.bin may be pickled", |f| {
                fs::write(f.join("pytorch_model.bin"), "").unwrap();
            }),
            (
                "several",
                ErrorKind::NotFound,
                "not clear which to take of a.safetensors, b.safetensors",
                |f| {
                    put(f, "a.safetensors", &[("a", 1)]);
                    put(f, "b.safetensors", &[("b", 1)]);
                },
            ),
            ("incomplete set", ErrorKind::NotFound, "not clear", |f| {
                put(f, "m-00001-of-00003.safetensors", &[("a", 1)]);
                put(f, "m-00003-of-00003.safetensors", &[("b", 1)]);
            }),
            ("same name in two shards", ErrorKind::BadData, "\"a\" is also in", |f| {
                put(f, "m-00001-of-00002.safetensors", &[("a", 1)]);
                put(f, "m-00002-of-00002.safetensors", &[("a", 1)]);
            }),
            ("missing shards", ErrorKind::NotFound, "lacks 2 of 3 files", |f| {
                put(f, "x.safetensors", &[("a", 1)]);
                put_index(f, &[("a", "x.safetensors"), ("b", "y.safetensors"), ("c", "z.safetensors")]);
            }),
            ("tensor not in its shard", ErrorKind::BadData, "\"b\" in x.safetensors", |f| {
                put(f, "x.safetensors", &[("a", 1)]);
                put_index(f, &[("a", "x.safetensors"), ("b", "x.safetensors")]);
            }),
            ("index leaves the folder", ErrorKind::BadData, "leads out of the folder", |f| {
                put_index(f, &[("a", "../x.safetensors")]);
            }),
            ("broken shard", ErrorKind::BadData, "x.safetensors", |f| {
                fs::write(f.join("x.safetensors"), "not at all").unwrap();
                put_index(f, &[("a", "x.safetensors")]);
            }),
        ];
        for (name, kind, message, build) in cases {
            let folder = tempfile::tempdir().unwrap();
            build(folder.path());
            let error = WeightFiles::open(folder.path()).expect_err(name);
            assert_eq!(error.kind(), *kind, "{name}: {error}");
            assert!(error.to_string().contains(message), "{name}: {error}");
        }
        let error = WeightFiles::open("no/such/folder").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn many_threads_read_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..64).map(|i| format!("t{i}")).collect();
        let data: Vec<Vec<u8>> = (0..64u8).map(|i| vec![i; 10_000 + i as usize]).collect();
        let mut writer = Writer::new();
        for (name, bytes) in names.iter().zip(&data) {
            writer.tensor(name, DType::U8, &[bytes.len()], bytes);
        }
        writer.write(folder.path().join(SINGLE)).unwrap();
        let weights = WeightFiles::open(folder.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (weights, names, data) = (&weights, &names, &data);
                scope.spawn(move || {
                    for i in (0..64).map(|i| (i * 7 + thread * 16) % 64) {
                        assert_eq!(weights.read(&names[i]).unwrap(), data[i]);
                    }
                });
            }
        });
    }
}
