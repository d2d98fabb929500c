//! Language models: configuration, model families, tokenizer, chat, caches, sampling, generation.
