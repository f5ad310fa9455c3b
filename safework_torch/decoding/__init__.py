"""Decoding on torch: the cache, prompts into it, and one token after another."""
