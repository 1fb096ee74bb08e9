"""The planner. It predicts the memory and time of a recipe on GPUs without using them.

It counts operations and bytes and calculates the rest. It measures nothing.
"""
