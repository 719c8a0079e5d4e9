"""Runs and scores as one HTML page and its figures, from metrics.jsonl and results.json alone."""
