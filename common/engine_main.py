"""What both engines' programs do with a verb and a config, given how to open the policy and judges in process.

train CONFIG...                                 the training loop
plan TARGET SLICES PARTS CONFIG...              what it needs of a target; PARTS is a JSON list of programs, [] all
attack OPTIONS CONFIG...                        attack the judges; OPTIONS is a JSON list
score FILE OUT LABEL CONFIG...                  score a file of prompts and responses; an empty LABEL is none
record FOLDER STEPS CONFIG...                   parity: sample the batches that both engines are fed
measure RECORDING GRADIENTS FOLDER CONFIG...    parity: run this engine's side of the ladder
relay RECORDING OTHER FOLDER CONFIG...          parity: go on where the other engine was after half of the steps
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import which
from typing import NamedTuple

from common.attack.trial import Options, attack
from common.config import ConfigError, LoadedConfig, load_words
from common.disk import NotSaved
from common.interrupt import INTERRUPTED, stop_at_sigterm
from common.parity.sides import OpenTrainer, measure_side, record_batches, relay_side
from common.plan.verb import OpenPlan, plan
from common.reporting import leave_unread
from common.rewards.scorer import ScoreMissing
from common.scoring.score import Job, score
from common.serving.in_process import OpenJudge
from common.serving.model import LocalJudge
from common.serving.served import ServerError
from common.team import ProcessesParted, Team
from common.trainer import NonFiniteUpdate
from common.training import train

# What the user can mend, said in a sentence; anything else is ours and keeps its traceback.
USER_ERRORS = (ConfigError, NotSaved, ProcessesParted, ScoreMissing, ServerError, NonFiniteUpdate)


class Engine(NamedTuple):
    """How an engine's program joins the other processes of a run, and opens its policy and the models of judges in
    process; and, where it can, what a config needs of machines that are not here.
    """

    open_team: Callable[[float], Team]
    open_trainer: OpenTrainer
    open_judge: Callable[[LoadedConfig, Path], LocalJudge]
    open_plan: OpenPlan | None = None

    def judge_opener(self, loaded: LoadedConfig) -> OpenJudge:
        """How judges in process are opened on this engine, for one config."""
        return partial(self.open_judge, loaded)


def run_verb(engine: Engine, words: Sequence[str]) -> int:
    """Run one verb with its words; returns the process's exit status: 0, INTERRUPTED after a signal, or 1."""
    stop_at_sigterm()
    try:
        return _run(engine, words)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        lost = "; what was done since the last checkpoint is lost" if words[:1] == ["train"] else ""
        with suppress(BrokenPipeError):  # nobody may be reading any more
            print(f"stopped at once{lost}.", file=sys.stderr)
        return INTERRUPTED
    finally:
        _part_from_lost_readers()


def _part_from_lost_readers() -> None:
    """What is left in the buffers for a reader that has gone would turn the exit status into Python's 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            leave_unread(stream)


def _run(engine: Engine, words: Sequence[str]) -> int:
    match words:
        case ["record" | "measure" | "relay" as verb, *rest]:
            return _parity(engine, verb, rest)
        case ["train", *config]:
            loaded, command = load_words(config), _command("train", *config)
            with engine.open_team(loaded.config.run.deadline_s) as team:
                return train(loaded, engine.open_trainer, engine.judge_opener(loaded), team, command)
        case ["plan", target, slices, parts, *config]:
            return plan(engine.open_plan, load_words(config), target, int(slices), tuple(json.loads(parts)))
        case ["attack", options, *config]:
            loaded = load_words(config)
            return attack(loaded, engine.judge_opener(loaded), Options(*json.loads(options)))
        case ["score", file, out, label, *config]:
            loaded, named = load_words(config), ["--label", label] if label else []
            command = _command("score", *config, file, "--out", out, *named)
            return score(loaded, engine.judge_opener(loaded), Job(Path(file), Path(out), label or None, command))
    return _usage()


def _command(*words: str) -> str:
    """What a person types for `safework` and these words: with its folder, where PATH has none or another's."""
    own, found = Path(sys.executable).with_name("safework"), which("safework")
    is_found = found is not None and Path(found).resolve() == own.resolve()
    return shlex.join(["safework" if is_found or not own.exists() else str(own), *words])


def _parity(engine: Engine, verb: str, words: Sequence[str]) -> int:
    match verb, *words:
        case ["record", folder, steps, *config]:
            loaded = load_words(config)
            record_batches(loaded, engine.open_trainer, engine.judge_opener(loaded), Path(folder), int(steps))
            return 0
        case ["measure", recording, gradients, folder, *config]:
            measure_side(load_words(config), engine.open_trainer, Path(recording), Path(gradients), Path(folder))
            return 0
        case ["relay", recording, other, folder, *config]:
            relay_side(load_words(config), engine.open_trainer, Path(recording), Path(other), Path(folder))
            return 0
    return _usage()


def _usage() -> int:
    print(f"usage:{__doc__}", file=sys.stderr)
    return 2
