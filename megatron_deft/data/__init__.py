"""From files to batches: chat templates, data sets in memory, the order of samples, tiny models."""
