"""Artifacts in the programs that users open them with."""
