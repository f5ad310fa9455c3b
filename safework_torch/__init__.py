"""The PyTorch engine: Hugging Face causal language models trained by GRPO."""
