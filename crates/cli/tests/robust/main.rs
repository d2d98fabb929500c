//! The program under bad circumstances: broken files, too little memory, signals and kills, odd surroundings.
//!
//! All of it through the built program on the tiny models of the fixtures. No test looks at the clock to judge.

mod hostile;
mod invariance;
mod kill;
mod memory;
mod newcomer;
mod program;
mod refusals;
