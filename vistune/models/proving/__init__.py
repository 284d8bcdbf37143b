"""Proofs about models on disk: that parts came through whole, that two checkpoints are the same model."""
