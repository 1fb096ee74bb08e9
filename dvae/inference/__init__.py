"""Use trained models: generate, refine, edit, inpaint, measure likelihood."""
