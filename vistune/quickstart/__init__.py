"""The main job in small: real handwritten digits, tiny parts, both stages, evaluation and export."""
