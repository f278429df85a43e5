"""Frames timed one at a time: the cascade, its forced exits and its baselines, in turn."""
