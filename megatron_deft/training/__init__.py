"""Training: the loop, its optimizer and schedule, checkpoints and metrics."""
