"""Measurements of speed and memory, side by side with what else computes the same thing."""
