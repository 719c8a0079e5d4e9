"""Architectures: Hugging Face config -> ModelSpec -> TransformerConfig -> GPTModel.

families.py knows no torch; spec.py and build.py import megatron-core, so this file imports neither.
"""
