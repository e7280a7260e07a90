"""ExecuTorch's TextLLMRunner, run here as it is."""
