"""bfloat16 on both engines, on a GPU: how far their logprobs are apart, and whether replayed updates stay together.

    python benchmarks/half_precision.py [smollm2 0.5b] [--steps 50] [--set batch.share_prompts=false]

smollm2: what the quickstart samples. 0.5b: random weights of Qwen2.5-0.5B's shapes and random tokens, without shared
prompts, so that both attend by their kernels. Gaps are means over sampled tokens of abs(difference); the goal is a gap
between the engines of at most 1.2 times that between bfloat16 and float32 on torch. Then the same updates on both, in
three orders, each its own seed: after each one the mean logprob of the first batch, which should be less apart between
engines in one order than between orders.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import train_step

from common.config import LoadedConfig, load_config
from common.parity.measure import LEARNING_RATE
from common.parity.recording import NOISE, batches, write_batch
from common.types import TrainBatch

ORDERS, BATCHES = 3, 10
SIDES = (("torch", "float32"), ("torch", "bfloat16"), ("jax", "bfloat16"))


def main() -> None:
    """Every side in a process of its own, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["smollm2", "0.5b"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", nargs=2, help="an engine and a dtype: measure here")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="more of the config, key=value")
    arguments = parser.parse_args()
    for case in arguments.cases:
        if arguments.side:
            engine, dtype = arguments.side
            measure(case, engine, dtype, arguments.steps, arguments.folder, arguments.set)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                words = [case, "--steps", str(arguments.steps), "--side", *side, "--folder", folder]
                subprocess.run([sys.executable, __file__, *words, "--set", *arguments.set], check=True)
            report(case, Path(folder))


def measure(case: str, engine: str, dtype: str, steps: int, folder: Path, more: list[str]) -> None:
    """Logprobs of the first batch and, in bfloat16, the curves."""
    loaded, model = opened(case, engine, dtype, folder, more)
    trainer = open_engine(loaded, model)
    if engine == "torch" and dtype == "float32":
        record(case, loaded, trainer, folder)
    recorded = batches(folder)
    np.save(folder / f"{engine}-{dtype}.npy", trainer.logprobs(recorded[0], "policy"))
    if dtype == "float32":
        return
    curves = []
    for order in range(ORDERS):
        del trainer
        trainer = open_engine(loaded, model)
        curves.append(list(replayed(trainer, recorded, steps, order)))
    (folder / f"{engine}.json").write_text(json.dumps(curves))


def replayed(trainer: Any, recorded: list[TrainBatch], steps: int, order: int) -> Iterator[float]:
    """The first batch's mean logprob after each update."""
    rng, first = np.random.default_rng(order), recorded[0]
    for _ in range(steps):
        batch = recorded[rng.integers(len(recorded))]
        noise = rng.normal(0.0, NOISE, batch.sampling_logprobs.shape)
        old = np.where(batch.sampled, batch.sampling_logprobs + noise, 0.0).astype(np.float32)
        trainer.update(replace(batch, old_logprobs=old), LEARNING_RATE)
        yield float(trainer.logprobs(first, "policy")[first.sampled].mean())


def report(case: str, folder: Path) -> None:
    """The figures of one case."""
    first = batches(folder)[0]
    whole, torch_half, jax_half = (np.load(folder / f"{engine}-{dtype}.npy")[first.sampled] for engine, dtype in SIDES)
    own, between = np.abs(torch_half - whole), np.abs(torch_half - jax_half)
    ours, theirs = (np.array(json.loads((folder / f"{engine}.json").read_text())) for engine in ("torch", "jax"))
    apart, spread = np.abs(ours - theirs).max(axis=0), np.ptp(ours, axis=0)
    moved = np.abs(ours[:, -1] - whole.mean()).max()
    print(
        f"{case:8s} logprobs: torch bf16-fp32 {own.mean():.2e} (largest {own.max():.2e}), torch-jax bf16 "
        f"{between.mean():.2e} ({between.max():.2e}), ratio {between.mean() / own.mean():.2f} "
        f"({between.max() / own.max():.2f}), jax bf16-torch fp32 {np.abs(jax_half - whole).mean():.2e}\n"
        f"{case:8s} mean logprob over {len(spread)} updates, moved by {moved:.2e}: apart at most {apart.max():.2e}, "
        f"spread of orders {spread.max():.2e}; at the end {apart[-1]:.2e} and {spread[-1]:.2e}; updates after which "
        f"they are further apart than orders {int((apart > spread).sum())}",
        flush=True,
    )


def opened(case: str, engine: str, dtype: str, folder: Path, more: list[str]) -> tuple[LoadedConfig, Path]:
    """The config of a side, and its model's folder."""
    numbers = [f"backend.dtype={dtype}", f"backend.torch.compile={dtype == 'bfloat16'}".lower(), *more]
    if case == "smollm2":
        from common.experiment import policy_folder

        loaded = load_config(["configs/quickstart.yaml"], [f"backend.name={engine}", "backend.threads=0", *numbers])
        return loaded, policy_folder(loaded)
    model, shape = folder / "model", train_step.CASES[case]
    if not model.exists():
        train_step.write_model(model, train_step.SHAPES[shape.shape])
    return train_step.load(shape, engine, "dots", model, numbers), model


def open_engine(loaded: LoadedConfig, model: Path) -> Any:
    """A trainer with the model's weights."""
    if loaded.config.backend.name == "torch":
        from safework_torch.main import open_trainer
    else:
        from safework_jax.main import open_trainer
    return open_trainer(loaded, model, None)


def record(case: str, loaded: LoadedConfig, trainer: Any, folder: Path) -> None:
    """Write the batches: what the policy samples, or random tokens."""
    if case == "smollm2":
        from common.parity.sides import record_batches
        from safework_torch.main import open_judge

        record_batches(loaded, lambda *_: trainer, partial(open_judge, loaded), folder, BATCHES)
        return
    shape = train_step.CASES[case]._replace(sequences=16)
    for number in range(BATCHES):
        batch = train_step.random_batch(shape, loaded.config.batch, number)
        exact = np.where(batch.sampled, trainer.logprobs(batch, "policy"), 0.0)
        write_batch(replace(batch, sampling_logprobs=exact, old_logprobs=None), folder, number)


if __name__ == "__main__":
    main()
