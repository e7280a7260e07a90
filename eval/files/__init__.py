"""Structure, sizes and memory of artifacts."""
