"""Build, store, load, import and quantize the networks of a run."""
