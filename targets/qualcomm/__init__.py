"""Qualcomm's compiler and simulator."""
