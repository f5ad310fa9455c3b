"""The `safework` command. Verbs that need an engine are handed to that engine's own program."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from rich.console import Console

from common.attack.report import refuse_untried
from common.attack.trial import Options
from common.config import ConfigError, LoadedConfig, checks, explain, load_config
from common.disk import not_written
from common.engine_main import INTERRUPTED, USER_ERRORS, split_arguments
from common.experiment import load_data, open_chat, policy_folder, reference_folder
from common.export import DTYPES, Weights, export_model
from common.launch import verb as launching
from common.parity.ladder import certificate, compare, compare_relays, table
from common.plan import verb as planning
from common.reporting import UnwatchedConsole
from common.run_dir import RunDir
from common.serving.fleet import serve
from common.serving.in_process import unopened

CONFIG_HELP = "run files (YAML) and key=value overrides; later ones win"


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `safework`; returns the exit status."""
    arguments = _parsed(words)
    try:
        return arguments.run(arguments)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; overrides may stand behind options too, where argparse takes no more words for a list."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and ("config" not in arguments or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.config += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safework", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train the policy of a config; resumes an unfinished run")
    train.add_argument("config", nargs="+", help=CONFIG_HELP)
    train.set_defaults(run=_train)

    score = verbs.add_parser("score", help="score prompts and responses, or a run's once more, by a config's verifiers")
    score.add_argument("config", nargs="+", metavar="CONFIG... FILE", help=f"{CONFIG_HELP}; the last file is scored")
    score.add_argument(
        "--out", type=Path, help="the scores; default: beside the file. What is in it is not asked again"
    )
    score.add_argument("--label", help="the label of records that have none")
    score.set_defaults(run=_score)

    check = verbs.add_parser(
        "check", help="print the resolved config with the origin of each value; check data and model"
    )
    check.add_argument("config", nargs="+", help=CONFIG_HELP)
    check.set_defaults(run=_check)

    servers = verbs.add_parser("serve", help="start the servers that a config's judges ask, until Ctrl-C")
    servers.add_argument("config", nargs="+", help=CONFIG_HELP)
    servers.add_argument("--only", metavar="NAME", help="this one of servers.* alone")
    servers.add_argument("--logs", type=Path, default=Path("servers"), help="folder of their output; default: servers/")
    servers.set_defaults(run=_serve)

    cluster = verbs.add_parser("launch", help="start a run on a cluster: a job file for SLURM or GKE, or on Ray")
    cluster.add_argument("config", nargs="+", help=CONFIG_HELP)
    launching.add_options(cluster)
    cluster.set_defaults(run=launching.launch)

    export = verbs.add_parser("export", help="write a run's newest checkpoint as a Hugging Face folder")
    _add_export_options(export)
    export.set_defaults(run=_export)

    parity = verbs.add_parser("parity", help="measure torch against JAX on a config's own model and data")
    parity.add_argument("config", nargs="+", help=CONFIG_HELP)
    parity.add_argument("--steps", type=launching.at_least_one, default=20, help="batches to record and replay")
    parity.add_argument("--out", type=Path, default=Path("parity.json"), help="the certificate")
    parity.set_defaults(run=_parity)

    plan = verbs.add_parser("plan", help="what a config needs of machines that are not here, and how fast it would be")
    plan.add_argument("config", nargs="+", help=CONFIG_HELP)
    planning.add_options(plan, launching.at_least_one)
    plan.set_defaults(run=_plan)

    attack = verbs.add_parser("attack", help="attack the judges of a config, and measure what each attack gains")
    attack.add_argument("config", nargs="+", help=CONFIG_HELP)
    attack.add_argument("--judge", nargs="+", action="extend", default=[], help="names of judges; default: all")
    attack.add_argument(
        "--samples", type=launching.at_least_one, default=0, help="bad answers a judge; default: all that suit it"
    )
    attack.add_argument("--out", default="", help="the report; default: rewards.attack_report")
    attack.set_defaults(run=_attack)
    return parser


def _add_export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_dir", type=Path, help="the folder of a run")
    export.add_argument("--out", type=Path, help="where to; default: export/ in the run folder")
    export.add_argument("--step", type=int, help="another checkpoint that is still there")
    export.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    export.add_argument("--weights", choices=get_args(Weights), default="policy", help="the policy's, or their average")


def _engine_command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"safework_{name}.main", *words]


def _train(arguments: argparse.Namespace) -> NoReturn:
    _hand_over(arguments.config, "train")


def _plan(arguments: argparse.Namespace) -> NoReturn:
    _hand_over(arguments.config, "plan", arguments.target, str(arguments.slices), json.dumps(arguments.only))


def _attack(arguments: argparse.Namespace) -> NoReturn:
    overrides = [word for word in arguments.judge if "=" in word]  # behind the names, as they may stand
    judges = [word for word in arguments.judge if word not in overrides]
    options = json.dumps(Options(judges, arguments.samples, arguments.out))
    _hand_over(arguments.config + overrides, "attack", options)


def _hand_over(config: list[str], *verb: str) -> NoReturn:
    """Let the engine's program take this process over, so that signals and exit status are its own."""
    name = load_config(*split_arguments(config)).config.backend.name
    sys.stdout.flush()
    os.execv(sys.executable, _engine_command(name, *verb, *config))


def _score(arguments: argparse.Namespace) -> NoReturn:
    files, overrides = split_arguments(arguments.config)
    if len(files) < 2:
        raise ConfigError(
            f"score got {' '.join(files) or 'no file'}. Give run files and, last, the file or run to score."
        )
    *configs, file = files
    out = arguments.out or _beside(Path(file))
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: no such folder. Make it, or give another path.")
    _hand_over([*configs, *overrides], "score", file, str(out), arguments.label or "")


def _beside(file: Path) -> Path:
    """Where the scores of a file, or of a run's folder, go."""
    return file / "scores.jsonl" if file.is_dir() else file.with_suffix(".scores.jsonl")


def _check(arguments: argparse.Namespace) -> int:
    loaded = load_config(*split_arguments(arguments.config))
    print(explain.explain(loaded), end="")
    for line in explain.explain_recipe(loaded.config):
        print(f"# {line}")
    for sentence in checks.warnings(loaded.config):
        print(f"# warning: {sentence}")
    print(f"# {_counts(loaded)}")
    return 0


def _counts(loaded: LoadedConfig) -> str:
    """Load data, tokenizer and recipe as a run would, and say what is there."""
    policy = policy_folder(loaded)
    chat = open_chat(loaded, policy)
    reference_folder(loaded, policy, chat)
    data = load_data(loaded, chat, unopened)
    refuse_untried(loaded, data.recipe)
    labels = ", ".join(data.recipe.terms)
    return f"{data.train.epoch_size} prompts an epoch, {len(data.heldout)} held out, labels: {labels}; ready to train"


def _serve(arguments: argparse.Namespace) -> int:
    loaded = load_config(*split_arguments(arguments.config))
    return 0 if serve(loaded, arguments.only, arguments.logs, UnwatchedConsole()) else INTERRUPTED


def _export(arguments: argparse.Namespace) -> int:
    config_file = arguments.run_dir / "config.yaml"
    for part in (config_file, arguments.run_dir / "checkpoints"):
        if not part.exists():
            raise ConfigError(f"{arguments.run_dir}: is not a run folder (no {part.name}). Give the run.dir of a run.")
    run_dir = RunDir(arguments.run_dir)
    steps = run_dir.saved_steps()
    if not steps:
        raise ConfigError(f"{arguments.run_dir}: no checkpoint is complete yet. Let it reach checkpoint.every steps.")
    step = steps[-1] if arguments.step is None else arguments.step
    if step not in steps:
        raise ConfigError(f"{arguments.run_dir}: no checkpoint of step {step}; complete are: {steps}.")
    out = arguments.out or run_dir.path / "export"
    source = policy_folder(load_config([config_file]))
    export_model(run_dir.checkpoint(step), source, out, arguments.dtype, arguments.weights)
    whose = "the policy" if arguments.weights == "policy" else "the policy's average"
    print(f"{out}: {whose} after step {step}, {arguments.dtype}")
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    config = load_config(*split_arguments(arguments.config)).config
    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: no such folder. Make it, or give another path.")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="safework-parity-") as name:
        folder = Path(name)
        recording, gradients = folder / "recording", folder / "torch" / "gradients-on.safetensors"
        _run_engine("torch", "record", str(recording), str(arguments.steps), *arguments.config)
        for engine in ("torch", "jax"):
            console.print(f"measuring {engine}")
            _run_engine(engine, "measure", str(recording), str(gradients), str(folder / engine), *arguments.config)
        relays = (("torch", "jax"), ("jax", "torch")) if arguments.steps > 1 else ()  # one step has no half
        for engine, other in relays:
            console.print(f"going on on {engine} where {other} was after half of the steps")
            _run_engine(engine, "relay", str(recording), str(folder / other), str(folder / engine), *arguments.config)
        rungs = compare(config, recording, folder / "torch", folder / "jax")
        if relays:
            rungs += compare_relays(config, folder / "torch", folder / "jax")
        written = json.dumps(certificate(config, recording, rungs), indent=1) + "\n"
    console.print(table(rungs))
    try:
        arguments.out.write_text(written)
    except OSError as error:
        raise not_written(arguments.out, error, "start the same command again") from error
    failed = [rung.name for rung in rungs if not rung.passed]
    console.print(f"{arguments.out}: {'FAILED: ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


def _run_engine(name: str, *words: str) -> None:
    # Each engine measures in its own process with its own backend.name, so that configs of both are exercised.
    if subprocess.run(_engine_command(name, *words, f"backend.name={name}"), check=False).returncode:
        raise ConfigError(f"the {name} engine could not do its part; its own message stands above.")


if __name__ == "__main__":
    sys.exit(main())
