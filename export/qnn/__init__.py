"""Qualcomm's compiled binaries, compared with what was compiled."""
