"""Runs on clusters: job files for SLURM and Kubernetes, and a Ray cluster's processes."""
