"""Text of a model: tokenizers, their pieces and patterns, chat templates."""
