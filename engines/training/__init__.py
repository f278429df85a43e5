"""Trains what engines.models makes, and exports the best of it as a bundle."""
