"""Looking at data before a run does: every row and picture judged, mended copies, pages of samples."""
