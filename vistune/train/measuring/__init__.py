"""How good a model is in the midst of its training: held-out loss, answers to benchmarks, and nothing else changed."""
