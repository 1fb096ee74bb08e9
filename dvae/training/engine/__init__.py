"""DeepSpeed, the optimizer with its moving averages, and what checkpoints are made of."""
