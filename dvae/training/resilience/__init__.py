"""Fault tolerance of training: ranks, watchdog, stopping, checkpoints and non-finite steps."""
