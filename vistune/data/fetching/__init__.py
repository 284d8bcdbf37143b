"""Published data sets with their pictures: downloaded with resume, checked, unpacked, counted, renamed."""
