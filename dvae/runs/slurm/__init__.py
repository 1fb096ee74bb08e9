"""Runs on SLURM: the programs that run inside a job. launchers/slurm.py submits the jobs."""
