//! What `mica quickstart` trains on: a small made-up world, written by a generator.
//!
//! The base model reads a corpus in which people live somewhere, keep animals, own things and so on,
//! and in which every document says its facts twice in different words; to predict the second telling,
//! a model must look facts up in the first ([`corpus`]). The instruction set asks about such facts and
//! wants one line of JSON ([`questions`]), a form that the corpus never uses. So the base model has the
//! skill but not the task: it answers (almost) nothing as asked, and a short LoRA run teaches it.
//!
//! Nothing leaks: every combination of a person and a value belongs, by its hash, to the corpus and the
//! training questions, or to the held-out questions, and to one of them only ([`world::Fact::held_out`]).
//! All texts are functions of a seed; names, words and sentences are this project's own.

pub mod corpus;
pub mod questions;
pub mod tokenizer;
pub mod world;
