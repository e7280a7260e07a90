"""Core ML on Macs, on iPhones and in our interpreter."""
