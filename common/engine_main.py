"""What both engines' programs do with a verb and a config, given how to open their trainer.

train CONFIG...                                 the training loop
score FILE OUT LABEL CONFIG...                  score a file of prompts and responses; an empty LABEL is none
record FOLDER STEPS CONFIG...                   parity: sample the batches that both engines are fed
measure RECORDING GRADIENTS FOLDER CONFIG...    parity: run this engine's side of the ladder
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.config import ConfigError, LoadedConfig, load_config
from common.experiment import load_data, open_chat, open_run, policy_folder, reference_folder, refuse_other_data
from common.export import export_model, exported_checkpoint
from common.interrupt import Interrupt
from common.loop import Loop
from common.parity.measure import ParityTrainer, measure
from common.parity.recording import record
from common.reporting import Reporter
from common.rewards.scorer import ScoreMissing
from common.rollout.sampler import RolloutSampler
from common.run_dir import NotSaved, RunDir, not_written
from common.scoring.score import Job, score
from common.serving.model import LocalJudge
from common.serving.served import ServerError
from common.trainer import NonFiniteUpdate

OpenTrainer = Callable[[LoadedConfig, Path, Path | None], ParityTrainer]
OpenEngineJudge = Callable[[LoadedConfig, Path], LocalJudge]

# What the user can mend, said in a sentence; anything else is ours and keeps its traceback.
USER_ERRORS = (ConfigError, NotSaved, ScoreMissing, ServerError, NonFiniteUpdate)
INTERRUPTED = 130


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files and key=value overrides, in any order."""
    files = [word for word in words if "=" not in word or os.path.exists(word)]
    return files, [word for word in words if word not in files]


class Engine(NamedTuple):
    """How an engine's program opens its policy and the models of judges in process."""

    open_trainer: OpenTrainer
    open_judge: OpenEngineJudge

    def opens(self, loaded: LoadedConfig) -> Callable[[Path], LocalJudge]:
        """How the judges in process of a config are opened."""
        return partial(self.open_judge, loaded)


def run_verb(engine: Engine, words: Sequence[str]) -> int:
    """Run one verb with its words; returns the process's exit status."""
    try:
        return _run(engine, words)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; what was done since the last checkpoint is lost.", file=sys.stderr)
        return INTERRUPTED


def _run(engine: Engine, words: Sequence[str]) -> int:
    match words:
        case ["train", *config]:
            return _train(engine, _load(config), f"safework train {shlex.join(config)}")
        case ["score", file, out, label, *config]:
            return _score(engine, config, Path(file), Path(out), label or None)
        case ["record", folder, steps, *config]:
            return _record(engine, _load(config), Path(folder), int(steps))
        case ["measure", recording, gradients, folder, *config]:
            return _measure(engine.open_trainer, _load(config), Path(recording), Path(gradients), Path(folder))
    print(f"usage:{__doc__}", file=sys.stderr)
    return 2


def _load(words: Sequence[str]) -> LoadedConfig:
    return load_config(*split_arguments(words))


def _train(engine: Engine, loaded: LoadedConfig, command: str) -> int:
    config = loaded.config
    policy = policy_folder(loaded)
    chat = open_chat(loaded, policy)
    reference = reference_folder(loaded, policy, chat)
    data = load_data(loaded, chat, engine.opens(loaded))
    with closing(open_run(loaded)) as run_dir:
        start = run_dir.state()
        if start.step >= config.run.steps:
            # It may have been killed after its last checkpoint and before the export of it.
            if exported_checkpoint(run_dir.path / "export") != run_dir.checkpoint(start.step).name:
                _export(run_dir, start.step, policy)
            print(f"{run_dir.path}: already trained for {start.step} steps; raise run.steps to go on. Nothing to do.")
            return 0
        refuse_other_data(start, data)
        trainer = engine.open_trainer(loaded, policy, reference)
        sampler = RolloutSampler(trainer, chat, config.rollout, config.run.seed)
        with closing(data.recipe), Interrupt("step") as interrupt, Reporter(config, start.step) as reporter:
            if start.step:
                reporter.say(f"{run_dir.path}: resuming after step {start.step}")
            state = Loop(config, trainer, data, sampler, run_dir, reporter, interrupt).run()
        if state.step < config.run.steps:
            done = (
                f"stopped and saved after step {state.step} of {config.run.steps}" if state.step else "stopped at once"
            )
            with suppress(BrokenPipeError):  # nobody may be reading any more
                print(f"{done}. To go on: {command}", file=sys.stderr)
            return INTERRUPTED
        _export(run_dir, state.step, policy)
    print(f"done: {run_dir.path}/export holds the trained model, metrics.jsonl and rollouts.jsonl the record")
    return 0


def _score(engine: Engine, config: Sequence[str], file: Path, out: Path, label: str | None) -> int:
    loaded, named = _load(config), [] if label is None else ["--label", label]
    command = shlex.join(["safework", "score", *config, str(file), "--out", str(out), *named])
    return score(loaded, engine.opens(loaded), Job(file, out, label, command))


def _export(run_dir: RunDir, step: int, policy: Path) -> None:
    export_model(run_dir.checkpoint(step), policy, run_dir.path / "export", "float32")


def _record(engine: Engine, loaded: LoadedConfig, folder: Path, steps: int) -> int:
    config = loaded.config
    policy = policy_folder(loaded)
    chat = open_chat(loaded, policy)
    data = load_data(loaded, chat, engine.opens(loaded))
    sampler = RolloutSampler(engine.open_trainer(loaded, policy, None), chat, config.rollout, config.run.seed)
    with closing(data.recipe), _temporary(folder):
        record(config, data, sampler, folder, steps)
    return 0


def _measure(open_trainer: OpenTrainer, loaded: LoadedConfig, recording: Path, gradients: Path, folder: Path) -> int:
    trainer = open_trainer(loaded, policy_folder(loaded), None)
    with _temporary(folder):
        measure(loaded.config, trainer, recording, gradients, folder)
    return 0


@contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Parity's files are of no use after it; what else can be said when the disk refuses them is where to put them."""
    try:
        yield
    except OSError as error:
        then = "start the same command again, or set TMPDIR to a folder with more room"
        raise not_written(error.filename or folder, error, then) from error
