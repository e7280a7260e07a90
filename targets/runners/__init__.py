"""The programs that users open artifacts with, run here as they are."""
