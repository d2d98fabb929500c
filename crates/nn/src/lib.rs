//! Modules, layers, losses and optimizers over mica-array.
