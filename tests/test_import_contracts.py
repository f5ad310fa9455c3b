"""Who imports whom stays as `.importlinter` says, and the method comes up in seconds without any engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "safework_torch", "safework_jax")
SECONDS = 6.0  # measured: one; a busy machine may take its time

# Prints how long importing every module of `common` took, and what came along.
IMPORT_ALL = """
import importlib, json, pkgutil, sys, time
started = time.perf_counter()
import common
names = [module.name for module in pkgutil.walk_packages(common.__path__, "common.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([time.perf_counter() - started, len(names), sorted({name.partition(".")[0] for name in sys.modules})]))
"""
ABSENT = ("torch", "jax", "jaxlib", "flax", "optax", "orbax", "transformers", "vllm", "sglang", "wandb", "ray")

# A line that breaks each contract, and the module it is added to.
VIOLATIONS = {
    "The method, from the command down to the arrays": ("common/data/records.py", "import common.loop"),
    "The method knows no engine and no model server": ("common/metrics.py", "def late():\n    import vllm"),
    "The backends never import each other": ("safework_torch/optimizer.py", "import safework_jax.optimizer"),
    "The torch backend needs no JAX": ("safework_torch/token_choice.py", "import jax"),
    "The JAX backend needs no torch": ("safework_jax/token_choice.py", "import torch"),
    "A config of either engine can be checked without the engine": ("safework_jax/config.py", "import jax.numpy"),
    "transformers is for common.data alone": ("common/experiment.py", "from transformers import AutoTokenizer"),
    "The types and what a backend implements know nothing of the method": ("common/trainer.py", "import common.config"),
    "Rewards know neither the mathematics nor the trainer": ("common/rewards/scorer.py", "import common.trainer"),
    "Ray is for starting runs alone": ("common/serving/health.py", "def late():\n    import ray"),
    "Files of a run are written without knowing its config": ("common/export.py", "import common.config.run"),
}


def lint(folder: Path) -> str:
    """What import-linter says of a working tree."""
    command = [sys.executable, "-c", "import sys, importlinter.cli as cli; sys.exit(cli.lint_imports(no_cache=True))"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def verdicts(output: str) -> dict[str, str]:
    """KEPT or BROKEN by contract name."""
    words = [line.rsplit(" ", 1) for line in output.splitlines()]
    return {pair[0]: pair[1] for pair in words if pair[-1] in ("KEPT", "BROKEN")}


def test_contracts_are_kept() -> None:
    output = lint(ROOT)
    assert verdicts(output) == dict.fromkeys(VIOLATIONS, "KEPT"), output


def test_every_contract_can_be_broken(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / ".importlinter", tmp_path / ".importlinter")
    for file, line in VIOLATIONS.values():
        with (tmp_path / file).open("a", encoding="utf-8") as module:
            module.write(f"\n{line}\n")
    output = lint(tmp_path)
    assert verdicts(output) == dict.fromkeys(VIOLATIONS, "BROKEN"), output


@pytest.fixture(scope="module")
def imported() -> tuple[float, int, list[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True, check=True
    )
    seconds, count, names = json.loads(run.stdout)
    return seconds, count, names


def test_the_method_imports_no_engine(imported: tuple[float, int, list[str]]) -> None:
    _, count, names = imported
    assert count == len([path for path in (ROOT / "common").rglob("*.py") if path != ROOT / "common" / "__init__.py"])
    assert [name for name in ABSENT if name in names] == []


def test_the_method_imports_quickly(imported: tuple[float, int, list[str]]) -> None:
    assert imported[0] < SECONDS
