"""Which models make the best cascade, at which thresholds: `edge-runtime search`."""
