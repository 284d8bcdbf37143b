"""Before a run: its steps, the memory it takes of each GPU, its time, whether it fits, and what would."""
