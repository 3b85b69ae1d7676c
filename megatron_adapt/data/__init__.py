"""Documents to token files, a blend plan in integers, and windows in a provable order."""
