"""Backbones, necks and exits in torch, to be trained and exported."""
