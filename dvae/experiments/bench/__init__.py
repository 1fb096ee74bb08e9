"""Benchmarks of the loader, the trainer and the planner."""
