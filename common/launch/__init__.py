"""Starting runs on clusters: SLURM, Kubernetes, Ray."""
