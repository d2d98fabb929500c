//! One persistent thread pool: task lists with barriers.
