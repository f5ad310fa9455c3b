"""The parts of a run put together from its config: data, recipe, chat template, run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, LoadedConfig, load_config
from common.config.explain import explain, forbidden_changes
from common.config.run import DataSource
from common.config.sentences import sentence
from common.data.chat import Chat
from common.data.dataset import LoadedSource, Mixture, load_source
from common.data.model_folder import model_folder
from common.rewards.recipe import Recipe
from common.run_dir import RunDir
from common.types import Prompt


@dataclass(frozen=True)
class Data:
    """Prompts that the recipe has accepted: the endless training mixture and the held-out list."""

    train: Mixture
    heldout: tuple[Prompt, ...]
    recipe: Recipe


def load_data(loaded: LoadedConfig, chat: Chat) -> Data:
    """Read every source, report what was left out, and check each prompt against the recipe.

    Raises ConfigError for bad records, prompts or labels, naming the file.
    """
    config = loaded.config

    def length(prompt: Prompt) -> int:
        return len(chat.encode_prompt(prompt.messages))

    def load(sources: list[DataSource]) -> list[LoadedSource]:
        return [load_source(config.data, source, length) for source in sources]

    train, heldout = load(config.data.train), load(config.data.heldout)
    for source in train + heldout:
        _report_left_out(source)
    recipe = _checked_recipe(loaded, train + heldout)
    return Data(
        Mixture(train, config.run.seed), tuple(prompt for source in heldout for prompt in source.prompts), recipe
    )


def _report_left_out(source: LoadedSource) -> None:
    for kind, reasons in (("bad records skipped", source.bad), ("prompts too long, dropped", source.long)):
        if reasons:
            print(f"{source.path}: {len(reasons)} {kind}, the first: {reasons[0]}", file=sys.stderr)


def _checked_recipe(loaded: LoadedConfig, sources: Sequence[LoadedSource]) -> Recipe:
    """The recipe of the labels that the data has, with every prompt accepted by the verifiers of its label."""
    rewards = loaded.config.rewards
    prompts = [(source.path, prompt) for source in sources for prompt in source.prompts]
    for path, prompt in prompts:
        if not rewards.recipe.get(prompt.label):
            raise ConfigError(
                f"{path}: prompt {prompt.id!r} has the label {prompt.label!r}, and rewards.recipe "
                f"({loaded.origin('rewards.recipe')}) has no terms for it. Labels with terms: "
                f"{', '.join(sorted(rewards.recipe))}. Correct the label or add it to the recipe."
            )
        if prompt.images:
            raise ConfigError(
                f"{path}: prompt {prompt.id!r} has images, and the model {loaded.config.model.path!r} reads text only. "
                "Remove the prompt."
            )
    recipe = Recipe(rewards, (prompt.label for _, prompt in prompts), loaded.origin)
    for path, prompt in prompts:
        try:
            recipe.check(prompt)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return recipe


def open_run(loaded: LoadedConfig) -> RunDir:
    """The run's folder, with its resolved config; a folder that holds a run goes on with it.

    Raises ConfigError when the folder cannot be made, another process trains in it, or it holds a run whose config
    differs in what must not change.
    """
    path, origin = loaded.config.run.dir, loaded.origin("run.dir")
    folder = Path(path).expanduser()
    if (folder / "config.yaml").exists() and not (folder / "checkpoints").is_dir():
        problem = (
            "holds a config.yaml but no checkpoints folder: it is no run, or has lost its checkpoints. "
            "Give run.dir a folder of its own."
        )
        raise ConfigError(sentence("run.dir", path, origin, problem))
    try:
        run_dir = RunDir(path)
    except OSError as error:
        problem = f"cannot be used as a folder ({error.strerror}). Give run.dir another path."
        raise ConfigError(sentence("run.dir", path, origin, problem)) from None
    if run_dir.config.exists() and run_dir.saved_steps():
        changes = forbidden_changes(load_config([run_dir.config]).config, loaded.config)
        if changes:
            problem = "holds a run of another config:\n  " + "\n  ".join(changes)
            raise ConfigError(
                f"{sentence('run.dir', path, origin, problem)}\nGive run.dir another folder, or set these keys back."
            )
    # Last, so that no refusal above leaves the folder claimed.
    if not run_dir.claim():
        problem = "another process is training in this folder. Wait for it or stop it, or give run.dir another path."
        raise ConfigError(sentence("run.dir", path, origin, problem))
    run_dir.write_config(explain(loaded))
    return run_dir


def policy_folder(loaded: LoadedConfig) -> Path:
    """The local folder of the policy's starting point."""
    return _folder(loaded, "model.path", loaded.config.model.path)


def reference_folder(loaded: LoadedConfig) -> Path | None:
    """The local folder of the reference model; None when the loss has no KL term.

    Raises ConfigError when its vocabulary is not the policy's.
    """
    model = loaded.config.model
    if loaded.config.loss.kl_coef == 0:
        return None
    if model.reference_path is None:
        return policy_folder(loaded)
    reference = _folder(loaded, "model.reference_path", model.reference_path)
    ours, theirs = Chat(policy_folder(loaded)).vocabulary, Chat(reference).vocabulary
    if ours != theirs:
        problem = (
            f"its vocabulary ({len(theirs)} tokens) is not that of model.path = {model.path!r} ({len(ours)} tokens), "
            "so their logprobs do not compare. Choose a model of the same family."
        )
        raise ConfigError(
            sentence("model.reference_path", model.reference_path, loaded.origin("model.reference_path"), problem)
        )
    return reference


def _folder(loaded: LoadedConfig, key: str, path: str) -> Path:
    try:
        return model_folder(path)
    except ConfigError as error:
        raise ConfigError(sentence(key, path, loaded.origin(key), str(error))) from None
