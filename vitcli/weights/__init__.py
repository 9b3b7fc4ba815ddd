"""Weights files: reading every layout, writing our own, and changing what was read."""
