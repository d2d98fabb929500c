//! What every test shares: tolerances, golden files, seeded random cases.
