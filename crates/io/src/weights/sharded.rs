//! Writing a folder's weights in files of bounded size.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use super::{INDEX, SINGLE, index};
use crate::content::{ContentResult, Source};
use crate::safetensors::{Entry, Writer};
use crate::{DType, Error, Result, atomic};

/// Bytes of weights in one file unless told otherwise: 5 GB, as Hugging Face's tools do.
pub const DEFAULT_MAX_SHARD: u64 = 5_000_000_000;

/// Weights to be written to a folder.
///
/// They are cut into files in the order they are added; a weight is never cut, so one larger than
/// the bound makes a larger file. One file is `model.safetensors`; several are
/// `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`, as Hugging Face's tools
/// write them. Within a file the layout is that of [`Writer`].
pub struct ShardedWriter<'a> {
    entries: Vec<Entry<'a>>,
    metadata: BTreeMap<String, String>,
    max_shard: u64,
}

impl Default for ShardedWriter<'_> {
    fn default() -> Self {
        ShardedWriter { entries: Vec::new(), metadata: BTreeMap::new(), max_shard: DEFAULT_MAX_SHARD }
    }
}

impl<'a> ShardedWriter<'a> {
    /// No weights yet, files of up to [`DEFAULT_MAX_SHARD`] bytes.
    pub fn new() -> ShardedWriter<'a> {
        ShardedWriter::default()
    }

    /// Bounds the bytes of weights in one file.
    pub fn max_shard_bytes(&mut self, bytes: u64) -> &mut Self {
        self.max_shard = bytes;
        self
    }

    /// Adds a text to every file's metadata. Hugging Face's tools want `format` to be there
    /// (`pt`; MLX writes `mlx`).
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Adds a weight. `bytes` are its elements, row-major and little-endian.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> &mut Self {
        let source = Source::Bytes(bytes);
        self.entries.push(Entry { name: name.into(), dtype, shape: shape.to_vec(), source });
        self
    }

    /// Adds a weight whose bytes `content` writes when their turn comes; turns come in the order
    /// of adding. See [`Writer::stream`].
    pub fn stream(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        content: impl FnOnce(&mut dyn Write) -> ContentResult + 'a,
    ) -> &mut Self {
        let source = Source::Stream(Box::new(content));
        self.entries.push(Entry { name: name.into(), dtype, shape: shape.to_vec(), source });
        self
    }

    /// Writes the files into `folder` (created if missing) and removes weight files of other names
    /// that an earlier model left there. Returns the names of the files written.
    ///
    /// Each file is written atomically, and the one that decides what is opened comes last. To
    /// replace a whole model folder at once, write into an [`AtomicDir`](atomic::AtomicDir).
    pub fn write(self, folder: impl AsRef<Path>) -> Result<Vec<String>> {
        let folder = folder.as_ref();
        let shards = cut(&self.entries, self.max_shard).map_err(|what| Error::invalid(folder, what))?;
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;

        let mut written = Vec::new();
        let mut weight_map = BTreeMap::new();
        let mut entries = self.entries.into_iter();
        for (number, len) in shards.lengths.iter().enumerate() {
            let name = match shards.lengths.len() {
                1 => SINGLE.to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let mut writer = Writer::new();
            for (key, value) in &self.metadata {
                writer.metadata(key, value);
            }
            for entry in entries.by_ref().take(*len) {
                weight_map.insert(entry.name.clone(), name.clone());
                writer.add(entry);
            }
            writer.write(folder.join(&name))?;
            written.push(name);
        }
        if written.len() > 1 {
            let index = serde_json::json!({
                "metadata": { "total_size": shards.bytes },
                "weight_map": weight_map,
            });
            let mut text = serde_json::to_string_pretty(&index).expect("texts and integers");
            text.push('\n');
            atomic::write(folder.join(INDEX), text)?;
            written.push(INDEX.to_owned());
        }
        remove_others(folder, &written)?;
        Ok(written)
    }
}

struct Shards {
    /// How many entries each file takes; at least one file.
    lengths: Vec<usize>,
    /// Bytes of all weights.
    bytes: u64,
}

fn cut(entries: &[Entry], max_shard: u64) -> Result<Shards, String> {
    let mut shards = Shards { lengths: vec![0], bytes: 0 };
    let mut filled = 0u64;
    let mut names = std::collections::HashSet::new();
    for Entry { name, dtype, shape, .. } in entries {
        // Within one file the writer would notice; here they may be far apart.
        if !names.insert(name) {
            return Err(format!("two weights are called {name:?}"));
        }
        let size = dtype
            .bytes_of(shape)
            .ok_or_else(|| format!("weight {name:?}: {dtype} {shape:?} is no possible size"))?
            as u64;
        let last = shards.lengths.len() - 1;
        let joined = filled.checked_add(size).filter(|&bytes| bytes <= max_shard);
        if joined.is_some() || shards.lengths[last] == 0 {
            shards.lengths[last] += 1;
            filled = filled.saturating_add(size);
        } else {
            shards.lengths.push(1);
            filled = size;
        }
        shards.bytes = shards.bytes.checked_add(size).ok_or("the weights together are too large")?;
    }
    Ok(shards)
}

/// Removes what an earlier model of another cut left, so that it is not opened by mistake.
fn remove_others(folder: &Path, written: &[String]) -> Result<()> {
    let read = |e| Error::io("read", folder, e);
    for entry in fs::read_dir(folder).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_ours = name == SINGLE
            || name == INDEX
            || index::parse_shard(name).is_some_and(|(stem, ..)| stem == "model");
        if is_ours && !written.iter().any(|w| w == name) {
            let path = folder.join(name);
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::WeightFiles;
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Weights "t0", "t1"… of these many bytes, the bytes being their number.
    fn write(folder: &Path, max_shard: u64, sizes: &[usize]) -> Result<Vec<String>> {
        let data: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, &n)| vec![i as u8; n]).collect();
        let mut writer = ShardedWriter::new();
        writer.max_shard_bytes(max_shard).metadata("format", "mlx");
        for (i, bytes) in data.iter().enumerate() {
            writer.tensor(format!("t{i}"), DType::U8, &[bytes.len()], bytes);
        }
        writer.write(folder)
    }

    #[test]
    fn cuts_where_the_bound_says() {
        // Bound, sizes, weights in each file.
        let cases: &[(u64, &[usize], &[usize])] = &[
            (10, &[], &[0]),
            (10, &[5, 5], &[2]),
            (10, &[5, 5, 1], &[2, 1]),
            (10, &[5, 6, 4, 1], &[1, 2, 1]),
            (10, &[25, 1], &[1, 1]),
            (10, &[1, 25, 1], &[1, 1, 1]),
            (10, &[0, 0, 10, 0], &[4]),
            (0, &[1, 0, 1], &[1, 1, 1]),
        ];
        for (bound, sizes, lengths) in cases {
            let folder = tempfile::tempdir().unwrap();
            let written = write(folder.path(), *bound, sizes).unwrap();
            let weights = WeightFiles::open(folder.path()).unwrap();
            let got: Vec<usize> = weights.files().iter().map(|f| f.tensors().len()).collect();
            assert_eq!(&got, lengths, "{bound} {sizes:?}");
            for (i, &size) in sizes.iter().enumerate() {
                assert_eq!(weights.read(&format!("t{i}")).unwrap(), vec![i as u8; size]);
            }
            let mut sorted = written.clone();
            sorted.sort();
            assert_eq!(names(folder.path()), sorted, "{bound} {sizes:?}");
        }
    }

    #[test]
    fn files_look_like_hugging_faces() {
        let folder = tempfile::tempdir().unwrap();
        let written = write(folder.path(), 2, &[2, 1]).unwrap();
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(written, [shards[0], shards[1], INDEX]);
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.path().join(INDEX)).unwrap()).unwrap();
        let expected = serde_json::json!({
            "metadata": {"total_size": 3},
            "weight_map": {"t0": shards[0], "t1": shards[1]},
        });
        assert_eq!(index, expected);
        assert_eq!(WeightFiles::open(folder.path()).unwrap().metadata("format"), Some("mlx"));
    }

    #[test]
    fn an_earlier_models_files_go_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::write(path.join("config.json"), "{}").unwrap();
        fs::write(path.join("adapters.safetensors"), "").unwrap();
        for (bound, sizes, count) in [(1, &[1, 1, 1][..], 4), (9, &[1, 1], 1), (1, &[1, 1], 3), (9, &[1], 1)]
        {
            let written = write(path, bound, sizes).unwrap();
            assert_eq!(written.len(), count);
            assert_eq!(names(path).len(), count + 2);
            assert_eq!(WeightFiles::open(path).unwrap().len(), sizes.len());
        }
    }

    #[test]
    fn equal_names_in_different_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::new();
        writer.max_shard_bytes(1);
        for name in ["a", "b", "a"] {
            writer.tensor(name, DType::U8, &[1], &[1]);
        }
        assert!(matches!(writer.write(folder.path()), Err(Error::Invalid { .. })));
        assert_eq!(names(folder.path()), [] as [&str; 0]);
    }
}
