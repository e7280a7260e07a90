"""Judging artifacts: opening what they are compared with, figures, causes."""
