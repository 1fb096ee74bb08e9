"""Import of public checkpoints: a torch file is read, without executing anything in it, and becomes a bundle."""
