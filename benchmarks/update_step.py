"""One update step against a plain transformers + AdamW step: seconds and peak memory, each side in its own process.

    python benchmarks/update_step.py [--runs 5] [--threads 2] [--rows 16] [--tokens 256]

Both sides take the same gradient step of PPO-clip on the same rows (half prompt, half response), fp32. The plain side
keeps the logits of all rows, as a loop written on transformers does. Sides take turns, one fresh process a run, after
one uncounted step each; memory is the process's peak resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDES = ("plain", "torch", "jax")
MODEL = "embedded:smollm2"


def main() -> None:
    """Run all sides in turns and print medians, or one side when called for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows-per-microbatch", type=int, default=4)
    parser.add_argument("--recompute", default="dots", choices=("none", "dots", "full"))
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.runs):
        for side in SIDES:
            results[side].append(start_side(side, sys.argv[1:], arguments.threads))
    report(results)


def start_side(side: str, words: list[str], threads: int) -> dict[str, float]:
    """One fresh process of one side."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *words, "--side", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and medians of the ratios to the plain side, pair by pair."""
    print(f"{'side':8s} {'seconds':>8s} {'ratio':>6s} {'peak GiB':>9s} {'ratio':>6s}")
    for side, runs in results.items():
        cells = []
        for key in ("seconds", "peak_gib"):
            ratios = [run[key] / base[key] for run, base in zip(runs, results["plain"], strict=True)]
            cells.append((statistics.median(run[key] for run in runs), statistics.median(ratios)))
        (seconds, slower), (peak, larger) = cells
        print(f"{side:8s} {seconds:8.2f} {slower:6.2f} {peak:9.2f} {larger:6.2f}")


def run_side(arguments: argparse.Namespace) -> dict[str, float]:
    """Two steps of one side: the second one's seconds, and the peak memory."""
    step = {"plain": plain_step, "torch": our_step, "jax": our_step}[arguments.side](arguments)
    step()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def rows(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids [B T] and the mask of the response half."""
    token_ids = np.random.default_rng(0).integers(1000, 40000, (arguments.rows, arguments.tokens)).astype(np.int32)
    sampled = np.zeros(token_ids.shape, bool)
    sampled[:, arguments.tokens // 2 :] = True
    return token_ids, sampled


def plain_step(arguments: argparse.Namespace) -> Callable[[], object]:
    """What a straightforward loop does: all logits, log-softmax, PPO-clip, backward, torch's AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    from common.data.model_folder import model_folder

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.01)
    token_ids, sampled = (torch.from_numpy(array) for array in rows(arguments))
    token_ids, mask = token_ids.long(), sampled[:, 1:].float()

    def step() -> None:
        logits = model(input_ids=token_ids).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        loss = -(torch.minimum(ratio, ratio.clip(0.8, 1.2)) * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(arguments: argparse.Namespace) -> Callable[[], object]:
    """The trainer's update of the chosen engine."""
    from importlib import import_module

    from common.config import load_config
    from common.data.batching import TrainSequence, pack
    from common.data.model_folder import model_folder

    folder = Path(__file__).parent.parent / "configs"
    loaded = load_config(
        [folder / "quickstart.yaml"],
        [
            f"backend.name={arguments.side}",
            f"backend.threads={arguments.threads}",
            f"batch.row_tokens={arguments.tokens}",
            f"batch.rows_per_microbatch={arguments.rows_per_microbatch}",
            "batch.share_prompts=false",
            f"backend.recompute={arguments.recompute}",
        ],
    )
    trainer = import_module(f"safework_{arguments.side}.main").open_trainer(loaded, model_folder(MODEL), None)
    token_ids, sampled = rows(arguments)
    half = arguments.tokens // 2
    sequences = [
        TrainSequence(row, ids[:half], ids[half:], mask[half:], np.zeros(half, np.float32), 1.0, 1.0 / sampled.sum())
        for row, (ids, mask) in enumerate(zip(token_ids, sampled, strict=True))
    ]
    batch = pack(sequences, loaded.config.batch)
    return lambda: trainer.update(batch, 1e-6)


if __name__ == "__main__":
    main()
