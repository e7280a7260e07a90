"""MLX, Apple's framework for its GPUs: the folder that mlx-lm and mlx-swift-lm open."""

FOLDER = "model"
"""Of an artifact: what these programs open."""
