"""What is shipped: the main run, set-up, bundles, the app."""
