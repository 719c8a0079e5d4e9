"""Scores of models on tasks: engines that generate, one module per task, tables with intervals."""
