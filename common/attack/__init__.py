"""Attacks on judges: what a policy could write to be scored higher than it deserves, and what it would gain."""
