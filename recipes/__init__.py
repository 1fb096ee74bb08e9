"""Hydra configs: recipes, presets of components, and settings of the tools."""
