"""The page: a web page on which a user explores a trained run."""
