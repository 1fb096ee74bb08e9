"""Runs on 2D points instead of images."""
