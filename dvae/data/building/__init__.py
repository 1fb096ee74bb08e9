"""Build shards from a source, and caches of latents from shards."""
