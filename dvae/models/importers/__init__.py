"""Readers of public checkpoints: a torch file, read without running anything in it, becomes a bundle."""
