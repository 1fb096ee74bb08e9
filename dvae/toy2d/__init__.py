"""Runs on points in the plane."""
