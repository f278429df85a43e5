"""Tests of the four packages; the folders mirror them."""
