"""Accuracy: how far an artifact's logits are from the checkpoint's."""
