"""Small runs for tests of the loop: their files, the processes they live in, and the records they leave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tiny import make_model
from tests.training import ROOT, write_run

LOWERCASE = [["Language", "English", "all lowercase"]]
IMPOSSIBLE = [["Length", "Words", "at least 500 words"]]

# What may differ between two runs that computed the same.
TIMED = ("time/", "tokens_per_s", "memory/")

# XLA spends half of its time on programs of tiny models, which run for milliseconds.
SOON_COMPILED = "--xla_backend_optimization_level=0"
# Engines on the CPU, one thread each, no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": SOON_COMPILED,
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
DEADLINE = 240.0


def prompt(number: int, reference: Any, **fields: Any) -> dict[str, Any]:
    """One data record, asking for something that the instruction rule checks."""
    return {
        "id": f"p{number}",
        "label": "instruction_rule",
        "prompt": f"Say {number}.",
        "reference": reference,
        **fields,
    }


def write_records(file: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Records as JSONL."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def lowercase_run(folder: Path, records: Iterable[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> Path:
    """A run file for a tiny model that is asked for lower case, which random bytes are about a quarter of the time.

    `records` replace the prompts; `sections` change single keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = write_records(folder / "prompts.jsonl", records or [prompt(n, LOWERCASE) for n in range(12)])
    tables: dict[str, dict[str, Any]] = {
        "run": {"steps": 4, "seed": 3},
        "data": {"train": [{"path": str(data)}], "heldout": [{"path": str(data)}]},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 0.5, "warmup_fraction": 0.0, "floor_fraction": 1.0},
        "checkpoint": {"every": 2},
    }
    for name, changes in sections.items():
        tables[name] = {**tables.get(name, {}), **changes}
    return write_run(folder, make_model(folder / "model", num_hidden_layers=1), **tables)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a record file; none where there is no file yet."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def untimed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what may differ between two equal runs."""
    return [{key: value for key, value in record.items() if not key.startswith(TIMED)} for record in records]


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-??????"))


def start(module: str, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """A program of the repository in a process of its own, both outputs piped."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process and collect what it printed."""
    out, error = process.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def to_go_on(stopped: subprocess.CompletedProcess[str], said: str = "") -> list[str]:
    """The words of `safework` that a stopped command ends with, saying how to go on behind what else it `said`."""
    before, _, command = stopped.stderr.removesuffix("\n").rpartition("To go on: ")
    assert before.endswith(said)
    program, *words = shlex.split(command)
    assert shutil.which(program)
    return words


def safework(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `safework` command, run to its end."""
    return finish(start("common.cli", *words, **environment))


@contextmanager
def running(module: str, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program that is killed, if it still runs, at the end of the block."""
    process = start(module, *words)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], pause: float = 0.002, deadline: float = DEADLINE
) -> None:
    """Poll until the condition holds. Fails when the process ends before it does, or after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(pause)
