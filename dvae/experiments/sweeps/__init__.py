"""Sweeps: many runs of one recipe with other settings, chosen by W&B's own engine from W&B's own kind of file."""
