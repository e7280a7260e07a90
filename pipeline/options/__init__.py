"""Options of the command line: their types, bounds, and when they have an effect."""
