"""The `safework` command. Verbs that need an engine are handed to that engine's own program."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, get_args

from common.attack.report import refuse_untried
from common.attack.trial import Options
from common.config import ConfigError, LoadedConfig, checks, explain, load_config, load_words
from common.config.load import split_words
from common.engine_main import INTERRUPTED, USER_ERRORS
from common.engine_programs import hand_over, is_installed
from common.experiment import explain_frozen, load_data, open_chat, policy_folder, reference_folder
from common.export import DTYPES, Weights, export_model
from common.launch import verb as launching
from common.parity import verb as comparing
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
    comparing.add_options(parity, launching.at_least_one)
    parity.set_defaults(run=comparing.parity)

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


def _train(arguments: argparse.Namespace) -> NoReturn:
    hand_over(arguments.config, "train")


def _plan(arguments: argparse.Namespace) -> NoReturn:
    parts, overrides = _names_and_overrides(arguments.only)
    planning.refuse_unknown(parts)
    config = arguments.config + overrides
    # Before anybody is told to install an engine that does not plan for it.
    planning.target_of(load_words(config), arguments.target, arguments.slices)
    hand_over(config, "plan", arguments.target, str(arguments.slices), json.dumps(parts))


def _attack(arguments: argparse.Namespace) -> NoReturn:
    judges, overrides = _names_and_overrides(arguments.judge)
    options = json.dumps(Options(judges, arguments.samples, arguments.out))
    hand_over(arguments.config + overrides, "attack", options)


def _names_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that an option takes, and overrides, which may stand behind them."""
    overrides = [word for word in words if "=" in word]
    return [word for word in words if word not in overrides], overrides


def _score(arguments: argparse.Namespace) -> NoReturn:
    files, overrides = split_words(arguments.config)
    if len(files) < 2:
        raise ConfigError(
            f"score got {' '.join(files) or 'no file'}. Give run files and, last, the file or run to score."
        )
    *configs, file = files
    out = arguments.out or _beside(Path(file))
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: no such folder. Make it, or give another path.")
    hand_over([*configs, *overrides], "score", file, str(out), arguments.label or "")


def _beside(file: Path) -> Path:
    """Where the scores of a file, or of a run's folder, go."""
    return file / "scores.jsonl" if file.is_dir() else file.with_suffix(".scores.jsonl")


def _check(arguments: argparse.Namespace) -> int:
    loaded = load_words(arguments.config)
    print(explain.explain(loaded), end="")
    for line in explain.explain_recipe(loaded.config):
        print(f"# {line}")
    for warning in checks.warnings(loaded.config):
        print(f"# warning: {warning}")
    for line in _loaded(loaded):
        print(f"# {line}")
    return 0


def _loaded(loaded: LoadedConfig) -> Iterator[str]:
    """Load data, tokenizer and recipe as a run would, and say what is there."""
    policy = policy_folder(loaded)
    if loaded.config.model.frozen:
        yield explain_frozen(loaded, policy)
    chat = open_chat(loaded, policy)
    reference_folder(loaded, policy, chat)
    data = load_data(loaded, chat, unopened)
    refuse_untried(loaded, data.recipe)
    labels, engine = ", ".join(data.recipe.terms), loaded.config.backend.name
    where = "" if is_installed(engine) else f" where {engine} is installed, which it is not here"
    counts = f"{data.train.epoch_size} prompts an epoch, {len(data.heldout)} held out, labels: {labels}"
    yield f"{counts}; ready to train{where}"


def _serve(arguments: argparse.Namespace) -> int:
    loaded = load_words(arguments.config)
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


if __name__ == "__main__":
    sys.exit(main())
