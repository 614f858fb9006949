"""Scores of a model set, computed from stored predictions and nothing else."""
