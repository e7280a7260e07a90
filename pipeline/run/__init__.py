"""A run: plan, stages, judging."""
