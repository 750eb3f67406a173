"""Models that were not written for this compiler."""
