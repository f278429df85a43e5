"""Tests of the project itself: its imports, its wheel, its documents."""
