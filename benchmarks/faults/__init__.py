"""Faults done to commands at work: kills, signals, failing disks, flipped bits."""
