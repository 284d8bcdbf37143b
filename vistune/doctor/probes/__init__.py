"""What is tried in processes of their own, since it may crash or hang: one file each, which prints its facts."""
