"""The verb `train`: a config's data, models and run folder put together, the loop run, the model exported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from common.attack.report import refuse_untried
from common.config import LoadedConfig, RunConfig, checks
from common.experiment import load_data, open_chat, policy_folder, reference_folder
from common.export import Weights, export_model, exported
from common.interrupt import INTERRUPTED, Interrupt
from common.loop import Loop
from common.reporting import Reporter
from common.resume import open_run, refuse_lost_average, refuse_missing_average, refuse_other_data
from common.rewards.scorer import Scorer
from common.rollout.sampler import RolloutSampler
from common.run_dir import RunDir
from common.serving.in_process import OpenJudge
from common.team import Team
from common.team_run import TeamRun
from common.trainer import PolicyTrainer

OpenTrainer = Callable[[LoadedConfig, Path, Path | None], PolicyTrainer]


def train(loaded: LoadedConfig, open_trainer: OpenTrainer, open_judge: OpenJudge, team: Team, command: str) -> int:
    """Train to the end or to an interrupt, from the newest checkpoint; returns the exit status. `command` goes on."""
    config = loaded.config
    for sentence in checks.warnings(config) if team.leads else ():
        print(f"warning: {sentence}", file=sys.stderr)
    policy = policy_folder(loaded)
    chat = open_chat(loaded, policy)
    reference = reference_folder(loaded, policy, chat)
    data = load_data(loaded, chat, open_judge, team)
    if team.leads:
        refuse_untried(loaded, data.recipe)
    with closing(_open_run(loaded, team)) as run_dir:
        [start, *_] = team.exchange(run_dir.state(), "the state to begin from")
        if start.step >= config.run.steps:
            if team.leads:
                _export_again(run_dir, start.step, policy, config.evaluation.weights)
            return 0
        refuse_other_data(start, data.digests)
        if start.step:
            refuse_lost_average(loaded, run_dir.checkpoint(start.step))
        trainer = open_trainer(loaded, policy, reference)
        sampler = RolloutSampler(trainer, chat, config.rollout, config.run.seed)
        scorer = Scorer(data.recipe, config.rewards, team)
        with closing(data.recipe), Interrupt("step") as interrupt, Reporter(config, start.step, team.leads) as reporter:
            begun = f"resuming after step {start.step}" if start.step else "beginning"
            reporter.say(f"{run_dir.path}: {begun}, {config.run.steps} steps on {config.backend.name}")
            with TeamRun(run_dir, team, interrupt, config.checkpoint.keep, config.run.deadline_s) as run:
                state = Loop(config, trainer, data, sampler, scorer, run, reporter).run()
        if team.leads:
            _end(run_dir, state.step, policy, config, command)
        return 0 if state.step == config.run.steps else INTERRUPTED


def _open_run(loaded: LoadedConfig, team: Team) -> RunDir:
    """The run's folder, which the process that leads opens before the others look at it."""
    if team.leads:
        run_dir = open_run(loaded)
        team.exchange(None, "the run folder")
        return run_dir
    team.exchange(None, "the run folder")
    return RunDir(loaded.config.run.dir)


def _export_again(run_dir: RunDir, step: int, policy: Path, weights: Weights) -> None:
    """What is left of a finished run: it may have been killed after its last checkpoint and before the export of it."""
    refuse_missing_average(run_dir.checkpoint(step), weights)
    done = "Nothing to do."
    if exported(run_dir.path / "export") != (run_dir.checkpoint(step).name, weights):
        _export(run_dir, step, policy, weights)
        done = "Its export was left to do, and is done."
    print(f"{run_dir.path}: already trained for {step} steps; raise run.steps to go on. {done}")


def _end(run_dir: RunDir, step: int, policy: Path, config: RunConfig, command: str) -> None:
    """Export the model of a finished run, or say how to go on."""
    if step == config.run.steps:
        _export(run_dir, step, policy, config.evaluation.weights)
        print(f"done: {run_dir.path}/export holds the trained model, metrics.jsonl and rollouts.jsonl the record")
        return
    done = f"stopped and saved after step {step} of {config.run.steps}" if step else "stopped at once"
    with suppress(BrokenPipeError):  # nobody may be reading any more
        print(f"{done}. To go on: {command}", file=sys.stderr)


def _export(run_dir: RunDir, step: int, policy: Path, weights: Weights) -> None:
    export_model(run_dir.checkpoint(step), policy, run_dir.path / "export", "float32", weights)
