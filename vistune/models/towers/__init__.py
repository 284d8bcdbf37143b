"""Vision towers: from pixels to features, one file for each kind."""
