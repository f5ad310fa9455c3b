"""Rollouts to rewards: verifiers, the rules that need no model, the recipe of each label, and the scorer."""
