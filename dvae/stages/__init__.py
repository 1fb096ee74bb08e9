"""The stages of a run, one file each: what it trains or computes."""
