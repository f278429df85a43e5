"""Exits and precision together, per sample: path tables, targets, fitted gates and their curves."""
