"""Benchmarks: questions asked of a model, answers scored as their authors score them, pages of what came out."""
