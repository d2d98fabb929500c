//! Containers and disk: safetensors, npy, JSONL, atomic writes, hashes.
