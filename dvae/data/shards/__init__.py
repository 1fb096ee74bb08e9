"""The shard format: manifest, tar files, readers, verification and remote shards."""
