"""The studies of `edge-runtime study`."""
