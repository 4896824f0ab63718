"""Measurements of simam: speed and accuracy."""
