"""Planting one bug in a copy of the source tree, and what its tests or the ladder say of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file, save_file

from common.config import load_config
from common.data.batching import TrainSequence, pack
from common.parity.ladder import Rung, compare
from safework_torch.main import open_trainer
from tests import runs
from tests.parity.inside_copy import WRONG_MODULE
from tests.parity.mutants import Mutant
from tests.parity.warm import ROOT, TREES, Warm
from tests.tiny import SIZES, make_model

ALGORITHMS = "tests/common/algorithms"
ENGINES = ("torch", "jax")
DEADLINE = 300
# No bytecode of a mutant is left behind.
ENVIRONMENT = {
    **runs.ENVIRONMENT,
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=false {runs.SOON_COMPILED}",
}


def mutated_text(mutant: Mutant) -> str:
    """The mutant's file with the bug in it."""
    source = (ROOT / mutant.file).read_text()
    count = source.count(mutant.old)
    assert count == 1, f"{mutant.file} holds {mutant.old!r} {count} times; bring the mutant {mutant.name!r} up to date"
    return source.replace(mutant.old, mutant.new)


def copy_tree(folder: Path, mutant: Mutant | None) -> Path:
    """A copy of the source tree in a new folder, with the bug in it if there is one."""
    folder.mkdir()
    for name in TREES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutant is not None:
        (folder / mutant.file).write_text(mutated_text(mutant))
    return folder


@dataclass(frozen=True)
class Verdict:
    """Whether a bug was caught by what should catch it, and what was said."""

    caught: bool
    text: str


@dataclass(frozen=True)
class Bench:
    """Where copies are made, what runs their code, and what the engines are measured on: a model, a run file, a
    recording, gradients.
    """

    folder: Path
    warm: Warm

    @property
    def recording(self) -> Path:
        return self.folder / "recording"

    @property
    def run_file(self) -> Path:
        return self.folder / "run.json"

    @property
    def gradients(self) -> Path:
        return self.folder / "gradients.safetensors"

    def measurement(self, engine: str) -> Path:
        """What the engine without bugs measured."""
        return self.folder / f"control-{engine}"

    def verdict(self, mutant: Mutant) -> Verdict:
        """Plant the bug and ask its test or its rung."""
        verdict = self._verdict_of_tests if mutant.engine is None else self._verdict_of_ladder
        with TemporaryDirectory(dir=self.folder) as name:
            return verdict(copy_tree(Path(name) / "tree", mutant), mutant)

    def _verdict_of_ladder(self, tree: Path, mutant: Mutant) -> Verdict:
        engine, measured = mutant.engine, tree / "measured"
        assert engine is not None
        self.measure(tree, mutant.file, engine, measured)
        failed = [rung for rung in self.rungs(engine, measured) if not rung.passed]
        said = "\n".join(f"{rung.name}: {rung.figure:.3g} of {rung.limit:.3g}, {rung.where}" for rung in failed)
        return Verdict(any(rung.name.startswith(mutant.caught_by) for rung in failed), said)

    def _verdict_of_tests(self, tree: Path, mutant: Mutant) -> Verdict:
        done = self.tests(tree, mutant.file, f"{ALGORITHMS}/{mutant.caught_by}")
        summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        failed = re.match(r"\d+ failed", summary) is not None and "error" not in summary
        return Verdict(done.returncode == 1 and failed, done.stdout)

    def tests(self, tree: Path, file: str, node: str) -> subprocess.CompletedProcess[str]:
        """Run a test of a copy in a process that has imported `file` from that copy."""
        return self._run(tree, file, "tests", node)

    def measure(self, tree: Path, file: str, engine: str, folder: Path) -> None:
        """Measure an engine of a copy, after `file` was imported from that copy."""
        words = (self.recording, self.gradients, folder, self.run_file, f"backend.name={engine}")
        done = self._run(tree, file, "measure", engine, *words)
        assert done.returncode == 0, done.stdout

    def rungs(self, engine: str, measured: Path) -> list[Rung]:
        """The ladder between one engine's measurement and that of the other engine without bugs."""
        config = load_config([self.run_file]).config
        folders = {name: self.measurement(name) for name in ENGINES} | {engine: measured}
        return compare(config, self.recording, folders["torch"], folders["jax"])

    def _run(self, tree: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        done = self.warm.run(tree, list(map(str, words)), DEADLINE)
        assert done.returncode != WRONG_MODULE, done.stdout
        return done


def make_bench(folder: Path, warm: Warm) -> Bench:
    """A tiny Qwen3, two recorded batches of packed rows with shared prompts, and gradients for the optimizers."""
    bench = Bench(folder, warm)
    model = make_model(folder / "model", "qwen3")
    tables = {
        "run": {"dir": str(folder / "run"), "steps": 2},
        "backend": {"name": "torch"},
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(folder / "no-data.jsonl")}], "max_prompt_tokens": 24},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 16, "temperature": 0.7},
        "rewards": {"verifiers": {}, "recipe": {}},
        "batch": {"row_tokens": 40, "rows_per_microbatch": 2, "share_prompts": True},
        "optimizer": {},
        "loss": {"kl_coef": 0.1},
    }
    bench.run_file.write_text(json.dumps(tables))
    _record(bench, model)
    weights = load_file(model / "model.safetensors")
    rng = np.random.default_rng(5)
    save_file({k: rng.normal(0.0, 0.02, v.shape).astype(np.float32) for k, v in weights.items()}, bench.gradients)
    return bench


def _record(bench: Bench, model: Path) -> None:
    """Two batches whose sampling logprobs are the policy's own, moved a little."""
    loaded = load_config([bench.run_file])
    trainer = open_trainer(loaded, model, None)
    bench.recording.mkdir()
    for step in range(2):
        batch = pack(_sequences(step), loaded.config.batch)
        assert len(batch.token_ids) > loaded.config.batch.rows_per_microbatch, "one micro-batch would show no average"
        own = trainer.logprobs(batch, "policy") + np.random.default_rng(step).normal(0.0, 0.05, batch.sampled.shape)
        moved = replace(batch, sampling_logprobs=np.where(batch.sampled, own, 0.0).astype(np.float32))
        held = {name: array for name, array in vars(moved).items() if array is not None}
        np.savez(bench.recording / f"batch-{step:03d}.npz", **held)


def _sequences(seed: int) -> list[TrainSequence]:
    """Four groups of three random responses; every prompt holds token 0, which is the model's padding token."""
    rng = np.random.default_rng(seed)
    sequences = []
    for group in range(4):
        prompt = np.append(rng.integers(3, SIZES["vocab_size"], rng.integers(4, 9)), 0).astype(np.int32)
        for _ in range(3):
            length = int(rng.integers(4, 11))
            sequences.append(
                TrainSequence(
                    group=group,
                    prompt=prompt,
                    token_ids=rng.integers(0, SIZES["vocab_size"], length).astype(np.int32),
                    sampled=np.ones(length, bool),
                    sampling_logprobs=np.zeros(length, np.float32),
                    advantage=float(rng.normal()),
                    weight=1.0 / 84,
                )
            )
    return sequences
