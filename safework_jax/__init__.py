"""The JAX engine: Flax decoders trained by GRPO under one jitted mesh program."""
