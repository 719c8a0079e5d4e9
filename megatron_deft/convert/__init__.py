"""Hugging Face folders to Megatron state and back, with a proof that both compute the same."""
