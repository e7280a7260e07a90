"""Rounding, GPTQ and AWQ, and the store of quantized checkpoints."""
