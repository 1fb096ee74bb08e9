"""The DeepSpeed engine, the optimizer with averaged weights, and the files of checkpoints and snapshots."""
