//! Fine-tuning: datasets, adapters, methods, the loop, checkpoints.
