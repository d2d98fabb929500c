//! Lazy arrays with function transformations.
