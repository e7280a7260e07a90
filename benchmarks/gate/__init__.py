"""The gate on purpose-made damage and on honest runs."""
