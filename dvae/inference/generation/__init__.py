"""Write many generated or edited images to a file. Requests can be resumed and can use several processes."""
