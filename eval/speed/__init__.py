"""Tokens a second: measured, emulated, estimated."""
