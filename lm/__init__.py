"""The language model: a LLaMA-style decoder written from scratch, trained on TinyStories."""
