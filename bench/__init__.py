"""Measurement: latency, baselines, and how each number was made."""
