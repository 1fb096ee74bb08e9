"""The planner: what a recipe would take on GPUs that are not here. It counts, and multiplies; it measures nothing."""
