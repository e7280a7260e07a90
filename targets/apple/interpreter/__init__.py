"""Core ML programs, computed here in torch."""
