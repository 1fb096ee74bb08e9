"""The page: a trained run to play with in a browser."""
