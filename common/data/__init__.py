"""Prompts in, packed batches out: records, mixtures, chat templates, model folders and batching."""
