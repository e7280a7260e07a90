"""Making, checking and installing bundles."""
