"""Work on many runs: sweeps, studies, benchmarks."""
