"""The decoder as operations that every runtime's exporter provides."""
