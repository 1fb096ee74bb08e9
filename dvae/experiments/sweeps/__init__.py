"""Sweeps: many runs of one recipe with different settings.

The settings are chosen by the sweep engine of W&B, from a W&B sweep file.
"""
