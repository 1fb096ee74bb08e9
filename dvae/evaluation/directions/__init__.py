"""Score directions of the latent space. dvae/inference/directions/ finds them and applies them."""
