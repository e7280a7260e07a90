"""Core ML programs, computed here in NumPy."""
