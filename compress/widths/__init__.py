"""Bits for every linear within a size or an accuracy."""
