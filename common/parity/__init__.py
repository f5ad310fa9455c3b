"""Proof that two engines compute the same thing: one recording, two measurements, a ladder of comparisons."""
