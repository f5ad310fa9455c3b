"""The decoder shared by Llama, Qwen2, Qwen2.5 and Qwen3 (dense): config, modules, cached decoding, names."""
