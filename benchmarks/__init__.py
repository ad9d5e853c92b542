"""Measurements: every figure is a ratio to a named peer in one run on one machine."""
