"""Tools that work on many runs: sweeps, studies and benchmarks."""
