"""Score directions in latent space. dvae/inference/directions/ finds and applies them."""
