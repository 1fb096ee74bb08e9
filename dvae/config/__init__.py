"""Settings of a run: their schema, their composition by Hydra, their storage, and their checks."""
