"""How codes are chosen: one module a method."""
