"""What runs here: child processes, generation, models in torch."""
