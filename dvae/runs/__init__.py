"""Run folders: their contents, and functions to start, follow, resume and cancel runs."""
