"""The stages of a run. Each file defines one stage: its settings, and what it trains or computes."""
