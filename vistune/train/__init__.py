"""Training: one stage, from a recipe to a model folder. `stage.py` is the table of contents."""
