"""How far an artifact's answers are from the checkpoint's."""
