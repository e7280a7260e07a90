"""LiteRT-LM, run here as it is."""
