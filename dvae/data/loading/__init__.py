"""Load training data: the sample order, the loader, prefetching of remote shards, and endless streams."""
