"""A study: the same training in several arms and with several seeds, scored alike at several numbers of steps.

Everything lies in one folder: shards, a run per seed for the encoder, a run per arm and seed for the refiner, the
figures of every point. What is there already is not made again.
"""
