"""Decoder language models in Flax NNX, named after the Hugging Face checkpoints they can load."""
