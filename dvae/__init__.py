"""dvae: train generator-refiner image models (DiffuseVAE and its relatives) at scale."""

__version__ = "0.1.0"
