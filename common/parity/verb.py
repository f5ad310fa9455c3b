"""The verb parity: both engines measured on a config's model and data, each by its own program, and compared."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from common.config import ConfigError, load_words
from common.config.load import ENGINES
from common.disk import not_written
from common.engine_programs import require_engine, run_engine
from common.parity.ladder import certificate, compare, compare_relays, table


def add_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The verb's options; `count` reads how many batches."""
    parser.add_argument("--steps", type=count, default=20, help="batches to record and replay")
    parser.add_argument("--out", type=Path, default=Path("parity.json"), help="the certificate")


def parity(arguments: argparse.Namespace) -> int:
    """Print the ladder and write its certificate; the exit status is 1 where a rung fails. Raises ConfigError."""
    config = load_words(arguments.config).config
    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: no such folder. Make it, or give another path.")
    for engine in ENGINES:
        require_engine(engine, "parity needs both")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="safework-parity-") as name:
        folder = Path(name)
        relays = _measure(arguments.config, arguments.steps, folder, console)
        rungs = compare(config, folder / "recording", folder / "torch", folder / "jax")
        if relays:
            rungs += compare_relays(config, folder / "torch", folder / "jax")
        written = json.dumps(certificate(config, folder / "recording", rungs), indent=1) + "\n"
    console.print(table(rungs))
    try:
        arguments.out.write_text(written)
    except OSError as error:
        raise not_written(arguments.out, error, "start the same command again") from error
    failed = [rung.name for rung in rungs if not rung.passed]
    console.print(f"{arguments.out}: {'FAILED: ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


def _measure(config: list[str], steps: int, folder: Path, console: Console) -> bool:
    """Record batches, measure both engines on them, and let each go on from the other; whether there was a relay."""
    recording, gradients = folder / "recording", folder / "torch" / "gradients-on.safetensors"
    run_engine("torch", "record", str(recording), str(steps), *config)
    for engine in ENGINES:
        console.print(f"measuring {engine}")
        run_engine(engine, "measure", str(recording), str(gradients), str(folder / engine), *config)
    relays = (("torch", "jax"), ("jax", "torch")) if steps > 1 else ()  # one step has no half
    for engine, other in relays:
        console.print(f"going on on {engine} where {other} was after half of the steps")
        run_engine(engine, "relay", str(recording), str(folder / other), str(folder / engine), *config)
    return bool(relays)
