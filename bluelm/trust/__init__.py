"""Where files come from: fetching within bounds, manifests, signatures, certificates, unsafe formats."""
