"""Limits and verdicts."""
