"""What a run leaves on disk: checkpoints, what it says about itself, the model folder at the end."""
