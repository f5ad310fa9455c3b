"""Embedded samplers against transformers' generate on the same prompts, paired in one process, medians of the runs.

    python benchmarks/sampler.py [--runs 5] [--threads 2] [--model embedded:smollm2]

Two tasks: 16 rows of 64 tokens each, and 4 prompts x 16 samples with natural stops. Compilation is excluded by one
run of each beforehand; the engines take turns, so that a drift of the machine's speed cancels in the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import safework_torch  # noqa: F401  (before torch: it decides how torch's threads wait)
from common.data.chat import Chat
from common.data.model_folder import model_folder
from common.rollout.sampler import uniforms
from common.trainer import Sampling, SamplingPrompt
from common.types import Message

QUESTIONS = (
    "Name three fruits that are red.",
    "What is 7 plus 5? Answer with the number only.",
    "Write one sentence about the sea.",
    "Give me a word that rhymes with light.",
)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="embedded:smollm2")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    tasks = {"16 rows x 64 tokens": (16, 1, 64, False), "4 prompts x 16 samples, natural stops": (4, 16, 96, True)}
    chat, samplers = open_samplers(arguments.model, arguments.threads)
    questions = [chat.encode_prompt([Message("user", question)]) for question in QUESTIONS]
    for title, task in tasks.items():
        report(title, measure(samplers, questions, task, arguments.runs))


Sampler = Callable[[list[np.ndarray], int, int, bool], int]


def measure(
    samplers: dict[str, Sampler], questions: list[np.ndarray], task: tuple[int, int, int, bool], runs: int
) -> dict[str, list[float]]:
    """Tokens per second of each sampler in each run, the samplers taking turns."""
    num_prompts, num_samples, max_new_tokens, stops = task
    prompts = [questions[index % len(questions)] for index in range(num_prompts)]
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    for run in range(runs + 1):
        for name, sampler in samplers.items():
            started = time.perf_counter()
            tokens = sampler(prompts, num_samples, max_new_tokens, stops)
            if run:
                speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def report(title: str, speeds: dict[str, list[float]]) -> None:
    """Medians and ratios to transformers, pair by pair."""
    print(title)
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, speeds["transformers"], strict=True)]
        print(
            f"  {name:14s} {statistics.median(values):7.1f} tok/s   ratio {statistics.median(ratios):.2f}"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def open_samplers(model: str, threads: int) -> tuple[Chat, dict[str, Sampler]]:
    """transformers, torch and jax over the same weights, and their tokenizer."""
    # torch is imported here, once OMP_NUM_THREADS is set.
    import torch

    from safework_torch.model import load_model

    torch.set_num_threads(threads)
    folder = model_folder(model)
    chat, policy = Chat(folder), load_model(folder, torch.device("cpu"))
    return chat, {"transformers": _transformers(policy, chat), "torch": _torch(policy, chat), "jax": _jax(folder, chat)}


def _transformers(model: Any, chat: Chat) -> Sampler:
    import torch

    def run(token_ids: list[np.ndarray], num_samples: int, max_new_tokens: int, stops: bool) -> int:
        longest = max(map(len, token_ids))
        ids = torch.zeros((len(token_ids), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(token_ids):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        stop = list(chat.stop_ids)
        least = 1 if stops else max_new_tokens
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=num_samples,
                max_new_tokens=max_new_tokens,
                min_new_tokens=least,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )[:, longest:]
        ended = torch.isin(out, torch.tensor(stop))
        counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        return int(counts.sum())

    return run


def _ours(sample: Callable, chat: Chat) -> Sampler:
    def run(token_ids: list[np.ndarray], num_samples: int, max_new_tokens: int, stops: bool) -> int:
        asked = [
            SamplingPrompt(prompt, uniforms(0, "train", 0, index, num_samples, max_new_tokens))
            for index, prompt in enumerate(token_ids)
        ]
        rule = Sampling(1.0, 1.0, 0, max_new_tokens, chat.stop_ids if stops else (), 64)
        return sum(len(response.token_ids) for group in sample(asked, rule) for response in group)

    return run


def _torch(model: Any, chat: Chat) -> Sampler:
    import torch

    from safework_torch.sampling import sample

    return _ours(lambda asked, rule: sample(model, asked, rule, torch.float32), chat)


def _jax(folder: Path, chat: Chat) -> Sampler:
    import jax.numpy as jnp

    from safework_jax.layout import ONE_DEVICE
    from safework_jax.model import load_model
    from safework_jax.sampling import Decoding, sample

    config, params = load_model(folder, jnp.float32)
    decoding = Decoding(config, jnp.dtype("float32"), ONE_DEVICE)
    return _ours(lambda asked, rule: sample(decoding, params, asked, rule), chat)


if __name__ == "__main__":
    main()
