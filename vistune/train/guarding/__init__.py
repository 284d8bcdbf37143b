"""What keeps a run safe: one at a time, nobody standing still, bad rows set aside, memory that ran out."""
