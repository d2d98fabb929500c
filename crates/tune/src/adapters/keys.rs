//! Which layers a list of keys means.

use crate::config::keys::unknown;
use crate::{Error, Result};

/// The modules that are adapted, as indices into `modules`.
///
/// `modules` are the paths of all layers that could be (`model.layers.0.self_attn.q_proj` …). A key is a path or the
/// end of one, whole parts at a time: `q_proj` and `self_attn.q_proj` mean the layer, `proj` does not. Without
/// keys, all are meant. A key that means no layer is an error: nothing would be trained, silently.
pub fn matching(keys: Option<&[String]>, modules: &[String]) -> Result<Vec<usize>> {
    let Some(keys) = keys else { return Ok((0..modules.len()).collect()) };
    for key in keys {
        if !modules.iter().any(|module| is_end(module, key)) {
            return Err(Error::Config(no_such_layer(key, modules)));
        }
    }
    let adapted = |module: &String| keys.iter().any(|key| is_end(module, key));
    Ok((0..modules.len()).filter(|&i| adapted(&modules[i])).collect())
}

fn is_end(module: &str, key: &str) -> bool {
    !key.is_empty() && module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The message, with the names that are there: ends of paths without the numbers of blocks.
fn no_such_layer(key: &str, modules: &[String]) -> String {
    let parts = key.split('.').count().max(1);
    let mut names: Vec<String> = modules
        .iter()
        .map(|module| {
            let all: Vec<&str> = module.split('.').collect();
            all[all.len().saturating_sub(parts)..].join(".")
        })
        .collect();
    names.sort();
    names.dedup();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    format!("{} (of layers that can have an adapter)", unknown("layer", key, key, &names))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<String> {
        let names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"];
        (0..2).flat_map(|i| names.map(|name| format!("model.layers.{i}.{name}"))).collect()
    }

    #[test]
    fn keys_are_paths_or_their_ends() {
        let cases: [(&str, &[&str], &[usize]); 4] = [
            ("suffix", &["q_proj"], &[0, 3]),
            ("longer suffix and another", &["self_attn.q_proj", "up_proj"], &[0, 2, 3, 5]),
            ("full path", &["model.layers.1.mlp.up_proj"], &[5]),
            ("two keys, one layer", &["q_proj", "self_attn.q_proj"], &[0, 3]),
        ];
        for (name, keys, expected) in cases {
            let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
            assert_eq!(matching(Some(&keys), &modules()).unwrap(), expected, "{name}");
        }
        assert_eq!(matching(None, &modules()).unwrap().len(), 6);
    }

    #[test]
    fn a_key_without_a_layer_is_an_error() {
        let cases = [
            ("typo", "q_porj", "did you mean \"q_proj\"?"),
            ("part of a name", "proj", "Known are: q_proj"),
            ("empty", "", "Known are"),
            ("with path", "self_atn.q_proj", "did you mean \"self_attn.q_proj\"?"),
        ];
        for (name, key, part) in cases {
            let keys = ["v_proj".to_string(), key.to_string()];
            let error = matching(Some(&keys), &modules()).expect_err(name).to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}
