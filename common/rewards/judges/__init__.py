"""Verifiers with a model: what they ask it and how its answer becomes a score."""
