"""From prompts to groups of sampled responses."""
