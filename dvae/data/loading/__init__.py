"""Load shards for training: the order of the samples, the loader, prefetching, streams."""
