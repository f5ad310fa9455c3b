"""What both engines' programs do with a verb and a config, given how to open their trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import ConfigError, LoadedConfig, load_config
from common.data.chat import Chat
from common.experiment import load_data, open_run, policy_folder, reference_folder
from common.interrupt import Interrupt
from common.loop import Loop
from common.reporting import Reporter
from common.rewards.scorer import ScoreMissing
from common.rollout.sampler import RolloutSampler
from common.run_dir import NotSaved
from common.trainer import NonFiniteUpdate, PolicyTrainer

OpenTrainer = Callable[[LoadedConfig, Path, Path | None], PolicyTrainer]

# What the user can mend, said in a sentence; anything else is ours and keeps its traceback.
USER_ERRORS = (ConfigError, NotSaved, ScoreMissing, NonFiniteUpdate)
INTERRUPTED = 130


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config files and key=value overrides, in any order."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def run_verb(open_trainer: OpenTrainer, words: Sequence[str]) -> int:
    """Run `train CONFIG... [key=value...]`; returns the process's exit status."""
    verbs = {"train": _train}
    try:
        return verbs[words[0]](open_trainer, load_config(*split_arguments(words[1:])))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train(open_trainer: OpenTrainer, loaded: LoadedConfig) -> int:
    config = loaded.config
    policy, reference = policy_folder(config), reference_folder(config)
    chat = Chat(policy, config.model.system)
    data = load_data(config, chat)
    run_dir = open_run(loaded)
    start = run_dir.state()
    if start.step >= config.run.steps:
        print(f"{run_dir.path}: already trained for {start.step} steps; raise run.steps to go on. Nothing to do.")
        return 0
    sampler_parts = (chat, config.rollout, config.run.seed)
    trainer = open_trainer(loaded, policy, reference)
    try:
        with Interrupt() as interrupt, Reporter(config, start.step) as reporter:
            if start.step:
                reporter.say(f"{run_dir.path}: resuming after step {start.step}")
            sampler = RolloutSampler(trainer, *sampler_parts)
            state = Loop(config, trainer, data, sampler, run_dir, reporter, interrupt).run()
    finally:
        data.recipe.close()
    if state.step < config.run.steps:
        print(f"stopped and saved after step {state.step}; start the same command again to resume.", file=sys.stderr)
        return INTERRUPTED
    trainer.export(run_dir.path / "export")
    print(f"done: {run_dir.path}/export holds the trained model, metrics.jsonl and rollouts.jsonl the record")
    return 0
