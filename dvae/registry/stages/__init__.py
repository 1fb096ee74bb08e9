"""Stages: the steps of a run. Each stage is a file in dvae/stages/."""
