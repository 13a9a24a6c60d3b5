"""Evaluation: one number about a whole model."""
