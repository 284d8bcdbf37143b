"""Any format to any other, and packs made before a run."""
