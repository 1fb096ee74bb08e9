"""The mathematics of diffusion: kernels, denoiser, objective, time grid, guidance, likelihood."""
