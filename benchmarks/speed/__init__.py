"""Time, memory and instructions."""
