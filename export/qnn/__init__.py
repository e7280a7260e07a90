"""Qualcomm's compiled binaries, held against what was compiled."""
