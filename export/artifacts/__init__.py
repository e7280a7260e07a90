"""What artifacts of every runtime have in common."""
