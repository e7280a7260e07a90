"""Measurements on artifacts, budgets, verdicts and reports."""
