"""The GRPO mathematics: advantages, token weights, policy losses, KL penalties and the learning-rate schedule."""
