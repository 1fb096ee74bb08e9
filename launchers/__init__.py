"""One file per way to run a job."""
