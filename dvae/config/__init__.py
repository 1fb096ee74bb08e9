"""Settings of a run: their schema, how Hydra composes them, how they are stored and checked."""
