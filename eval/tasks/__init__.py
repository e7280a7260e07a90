"""Benchmarks with questions and answers."""
