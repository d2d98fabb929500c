//! Block formats of quantized weights, over bytes.
