"""From data files to batches: formats, index, plan, loader. Knows nothing of models."""
