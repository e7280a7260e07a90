"""The command line, the plan and the run."""
