"""Score directions of the latent space."""
