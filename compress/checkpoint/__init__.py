"""Quantized checkpoints on disk: pieces, digests, work that goes on where it stopped."""
