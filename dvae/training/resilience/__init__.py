"""Training that survives failures: ranks, watchdog, stopping, checkpoints, non-finite steps."""
