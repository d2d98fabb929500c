//! What `mica quickstart` trains on: a small made-up world, written by a generator.
//!
//! The base model reads a corpus that tells everything about the people of the world over and over, in
//! ever other words ([`corpus`]), until it knows them: it can finish any sentence about any of them. It
//! has never seen a question about them, though: spoken to, it rambles. The instruction set asks about
//! these people and wants one sentence that answers ([`questions`]). So the base model has the knowledge but
//! not the task: it answers nothing as asked, and a short LoRA run teaches it how.
//!
//! Nothing leaks: held-out questions ask about people whom no training question mentions, so their answers
//! can come from the base model only, and what is learnt in fine-tuning is the task. (An earlier world put
//! the facts into the question, to be looked up there. Looking up is a skill that models of this size
//! begin to learn only after many times as many tokens; knowing is what they learn first. And answers in JSON,
//! whose marks the base had hardly met, were learnt as a form only: the values stayed at chance.)
//!
//! All texts are functions of a seed; names, words and sentences are this project's own.

pub mod corpus;
pub mod questions;
pub mod tokenizer;
pub mod world;
