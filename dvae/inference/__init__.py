"""Use trained models: generate, refine, edit and inpaint images, and measure likelihood."""
