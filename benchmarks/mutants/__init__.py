"""Small faults put into modules, which their tests should see."""
