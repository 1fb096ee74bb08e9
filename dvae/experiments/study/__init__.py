"""A study compares several variants of a training, called arms.

Each arm is trained with several seeds, and scored in the same way at several numbers of sampler steps. One folder holds
all results, and existing results are reused:

- the image shards
- an encoder run per seed
- a refiner run per arm and seed
- the scores of every arm and number of steps
"""
