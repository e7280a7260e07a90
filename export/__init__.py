"""Lowering a quantized checkpoint to the files of one runtime."""
