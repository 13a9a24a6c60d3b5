"""Capture: what flows into every linear, reduced as it flows."""
