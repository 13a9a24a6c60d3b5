"""Quantisation and smoothing."""
