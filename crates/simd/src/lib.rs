//! Instruction-set detection and vector mathematics.
