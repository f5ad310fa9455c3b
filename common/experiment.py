"""The parts of a run put together from its config: data, recipe, chat template, run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, LoadedConfig, RunConfig, load_config
from common.config.explain import explain, forbidden_changes
from common.config.run import DataSource
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


def load_data(config: RunConfig, chat: Chat) -> Data:
    """Read every source, report what was left out, and check each reference against its verifiers.

    Raises ConfigError for bad records, prompts or labels.
    """

    def length(prompt: Prompt) -> int:
        return len(chat.encode_prompt(prompt.messages))

    def load(sources: list[DataSource]) -> list[LoadedSource]:
        return [load_source(config.data, source, length) for source in sources]

    train, heldout = load(config.data.train), load(config.data.heldout)
    for source in train + heldout:
        _report_left_out(source)
    prompts = [prompt for source in train + heldout for prompt in source.prompts]
    recipe = Recipe(config.rewards, (prompt.label for prompt in prompts))
    for prompt in prompts:
        if prompt.images:
            raise ConfigError(
                f"prompt {prompt.id!r} has images, and the model {config.model.path!r} reads text only. Remove it."
            )
        recipe.check(prompt)
    return Data(
        Mixture(train, config.run.seed), tuple(prompt for source in heldout for prompt in source.prompts), recipe
    )


def _report_left_out(source: LoadedSource) -> None:
    for kind, reasons in (("bad records skipped", source.bad), ("prompts too long, dropped", source.long)):
        if reasons:
            print(f"{source.path}: {len(reasons)} {kind}, the first: {reasons[0]}", file=sys.stderr)


def open_run(loaded: LoadedConfig) -> RunDir:
    """The run's folder, with its resolved config; a folder that holds a run goes on with it.

    Raises ConfigError when the folder holds a run whose config differs in what must not change.
    """
    run_dir = RunDir(loaded.config.run.dir)
    if run_dir.config.exists() and run_dir.saved_steps():
        changes = forbidden_changes(load_config([run_dir.config]).config, loaded.config)
        if changes:
            raise ConfigError(
                f"run.dir = {loaded.config.run.dir!r} ({loaded.origin('run.dir')}): holds a run of another config:\n"
                "  " + "\n  ".join(changes) + "\nGive run.dir another folder, or set these keys back."
            )
    run_dir.write_config(explain(loaded))
    return run_dir


def policy_folder(config: RunConfig) -> Path:
    """The local folder of the policy's starting point."""
    return model_folder(config.model.path)


def reference_folder(config: RunConfig) -> Path | None:
    """The local folder of the reference model; None when the loss has no KL term.

    Raises ConfigError when its vocabulary is not the policy's.
    """
    if config.loss.kl_coef == 0:
        return None
    policy = policy_folder(config)
    if config.model.reference_path is None:
        return policy
    reference = model_folder(config.model.reference_path)
    ours, theirs = Chat(policy).vocabulary, Chat(reference).vocabulary
    if ours != theirs:
        raise ConfigError(
            f"model.reference_path = {config.model.reference_path!r}: its vocabulary ({len(theirs)} tokens) is not "
            f"that of model.path ({len(ours)} tokens), so their logprobs do not compare. Choose one of the same family."
        )
    return reference
