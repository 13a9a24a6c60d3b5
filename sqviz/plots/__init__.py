"""Plots: pure functions from arrays to plotly figures. No torch here."""
