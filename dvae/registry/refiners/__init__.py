"""Refiners, one file each. base.py defines the abstract class and the registry."""
