"""What is given on the command line: options, their bounds, and which have an effect."""
