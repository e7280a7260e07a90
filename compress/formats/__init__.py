"""Quantized Hugging Face checkpoints of other tools: read without changing a code, and written."""
