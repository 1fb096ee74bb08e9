"""Launchers: ways to run a job. Each launcher is a file in the folder launchers/."""
