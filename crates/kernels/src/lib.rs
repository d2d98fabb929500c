//! CPU kernels over checked views.
