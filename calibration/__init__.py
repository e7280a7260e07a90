"""Calibration texts, token windows, and running the model block by block."""
