"""Whether a run may begin in its folder, or go on with what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.config import ConfigError, LoadedConfig, load_config
from common.config.explain import explain, forbidden_changes
from common.config.sentences import sentence
from common.export import Weights
from common.run_dir import LoopState, RunDir
from common.state_files import saved_kinds


def open_run(loaded: LoadedConfig) -> RunDir:
    """The run's folder, with its resolved config; a folder that holds a run goes on with it.

    Raises ConfigError when the folder cannot be made, another process trains in it, or it holds a run whose config
    differs in what must not change.
    """
    path = loaded.config.run.dir
    folder = Path(path).expanduser()
    if (folder / "config.yaml").exists() and not (folder / "checkpoints").is_dir():
        problem = "holds a config.yaml but no checkpoints folder: it is no run, or has lost its checkpoints."
        raise _run_refusal(loaded, f"{problem} Give run.dir a folder of its own.")
    try:
        run_dir = RunDir(path)
        changes = _forbidden_changes(run_dir, loaded)
        # Behind this refusal, which would leave the folder claimed.
        claimed = not changes and run_dir.claim()
    except OSError as error:
        problem = f"cannot be used as a folder ({error.strerror}). Give run.dir another path."
        raise _run_refusal(loaded, problem) from None
    if changes:
        problem = "\n  ".join(["holds a run of another config:", *changes])
        raise _run_refusal(loaded, f"{problem}\nGive run.dir another folder, or set these keys back.")
    if not claimed:
        problem = "another process is training in this folder."
        raise _run_refusal(loaded, f"{problem} Wait for it or stop it, or give run.dir another path.")
    run_dir.write_config(explain(loaded))
    return run_dir


def refuse_other_data(state: LoopState, digests: Mapping[str, str]) -> None:
    """Raise ConfigError when a data file is not what it was when the run saved this state: its cursor means nothing in
    another order, and every change of a file makes another order. digests: SHA-256 by path, as they are now.
    """
    changed = [path for path, digest in digests.items() if state.data.get(path, digest) != digest]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: changed since this run saved its step {state.step}. Put the old contents back, "
            "or start anew in another run.dir."
        )


def refuse_lost_average(loaded: LoadedConfig, checkpoint: Path) -> None:
    """Raise ConfigError when the checkpoint to go on from has an average of the weights, and the config keeps none."""
    if loaded.config.ema.decay is None and "ema" in saved_kinds(checkpoint):
        problem = f"{checkpoint} has an average of the weights, which would be lost. Set it to go on with the average."
        raise ConfigError(sentence("ema.decay", None, loaded.origin("ema.decay"), problem))


def refuse_missing_average(checkpoint: Path, weights: Weights) -> None:
    """Raise ConfigError when a finished run's average is asked for, and its last checkpoint has none."""
    if weights == "ema" and "ema" not in saved_kinds(checkpoint):
        raise ConfigError(
            f"evaluation.weights = ema: {checkpoint} ends a run without an average. Set it to policy, or raise "
            "run.steps to train on with one."
        )


def _run_refusal(loaded: LoadedConfig, problem: str) -> ConfigError:
    return ConfigError(sentence("run.dir", loaded.config.run.dir, loaded.origin("run.dir"), problem))


def _forbidden_changes(run_dir: RunDir, loaded: LoadedConfig) -> list[str]:
    """What a run that has been trained in this folder must not change and does."""
    if not (run_dir.config.exists() and run_dir.saved_steps()):
        return []
    return forbidden_changes(load_config([run_dir.config]).config, loaded.config)
