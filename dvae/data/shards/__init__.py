"""The shard format: manifest, tar files, readers, verification, remote shards."""
