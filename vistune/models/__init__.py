"""Models: families, assembling, loading, saving, and the proof that what was assembled is what it came from."""
