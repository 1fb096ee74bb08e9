"""Runs on SLURM: what goes on in a job of theirs. Jobs are submitted by launchers/slurm.py."""
