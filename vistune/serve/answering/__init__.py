"""Many requests answered at once by one model: rows, steps, pieces of prompts, pictures seen once."""
