"""The model: config, checkpoint, tokenizer and the float decoder."""
