"""Write many generated or edited images to a file: resumable, by several processes."""
