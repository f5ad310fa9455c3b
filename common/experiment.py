"""The parts of a run put together from its config: data, recipe, chat template, model folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError, LoadedConfig
from common.config.run import DataSource
from common.config.sentences import blamed, sentence
from common.data.chat import Chat
from common.data.dataset import LoadedSource, Mixture, load_source
from common.data.frozen import refuse_unfit, share_of_frozen
from common.data.model_config import is_classifier, read_model_config
from common.data.model_folder import model_folder
from common.rewards.recipe import Recipe
from common.rollout.sampler import sampling_rule
from common.serving.in_process import OpenJudge
from common.serving.servers import Servers
from common.team import Team, alone
from common.types import Prompt


@dataclass(frozen=True)
class Data:
    """Prompts that the recipe has accepted: the endless training mixture and the held-out list.

    digests: the SHA-256 of each file that they come from, by path.
    """

    train: Mixture
    heldout: tuple[Prompt, ...]
    recipe: Recipe
    digests: dict[str, str]


def load_data(loaded: LoadedConfig, chat: Chat, open_judge: OpenJudge, team: Team | None = None) -> Data:
    """Read every source, report what was left out, and check each prompt against the recipe. In a team one process
    reports, and one of each host opens the judges.

    Raises ConfigError for bad records, prompts or labels, naming the file, and ServerError for judges whose server
    cannot be used.
    """
    config, team = loaded.config, team or alone()

    def length(prompt: Prompt) -> int:
        return len(chat.encode_prompt(prompt.messages))

    def load(sources: list[DataSource]) -> list[LoadedSource]:
        return [load_source(config.data, source, length) for source in sources]

    train, heldout = load(config.data.train), load(config.data.heldout)
    for source in train + heldout if team.leads else ():
        _report_left_out(source)
    recipe = _checked_recipe(loaded, train + heldout, Servers(loaded, open_judge, team.feeds))
    return Data(
        train=Mixture(train, config.run.seed),
        heldout=tuple(prompt for source in heldout for prompt in source.prompts),
        recipe=recipe,
        digests={source.path: source.sha256 for source in train + heldout},
    )


def _report_left_out(source: LoadedSource) -> None:
    for kind, reasons in (("bad records skipped", source.bad), ("prompts too long, dropped", source.long)):
        if reasons:
            print(f"{source.path}: {len(reasons)} {kind}, the first: {reasons[0]}", file=sys.stderr)


def _checked_recipe(loaded: LoadedConfig, sources: Sequence[LoadedSource], servers: Servers) -> Recipe:
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
    recipe = Recipe(rewards, servers, (prompt.label for _, prompt in prompts), loaded.origin)
    for path, prompt in prompts:
        try:
            recipe.check(prompt)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return recipe


def policy_folder(loaded: LoadedConfig) -> Path:
    """The local folder of the policy's starting point. Raises ConfigError for a model that cannot write."""
    folder = _folder(loaded, "model.path", loaded.config.model.path)
    policy_config(loaded, folder)
    return folder


def policy_config(loaded: LoadedConfig, folder: Path) -> dict[str, Any]:
    """The accepted config.json of the policy's folder. Raises ConfigError for a model that cannot write, and for
    patterns of frozen tensors that do not fit it.
    """
    with blamed("model.path", loaded.config.model.path, loaded.origin):
        hf = read_model_config(folder)
        if is_classifier(hf):
            raise ConfigError("has a classification head and cannot write. Choose a causal language model.")
    with blamed("model.frozen", loaded.config.model.frozen, loaded.origin):
        refuse_unfit(hf, loaded.config.model.frozen)
    return hf


def explain_frozen(loaded: LoadedConfig, policy: Path) -> str:
    """How much of the policy is not trained. Raises ConfigError as `policy_config` does."""
    return share_of_frozen(policy_config(loaded, policy), loaded.config.model.frozen)


def open_chat(loaded: LoadedConfig, policy: Path) -> Chat:
    """The tokenizer and chat template of the policy's folder.

    Raises ConfigError when the tokenizer has ids for which the model has no embedding, or the config has a stop string
    that is none of its tokens.
    """
    chat = Chat(policy, loaded.config.model.system)
    _check_embedding(loaded, "model.path", loaded.config.model.path, policy, chat)
    sampling_rule(loaded.config.rollout, chat)
    return chat


def _check_embedding(loaded: LoadedConfig, key: str, path: str, folder: Path, chat: Chat) -> None:
    size = read_model_config(folder)["vocab_size"]
    largest = max(chat.vocabulary.values())
    if largest >= size:
        problem = (
            f"its tokenizer has ids up to {largest}, but its config.json says vocab_size = {size}. "
            "Use the tokenizer that the model was trained with, or resize its embedding."
        )
        raise ConfigError(sentence(key, path, loaded.origin(key), problem))


def reference_folder(loaded: LoadedConfig, policy: Path, chat: Chat) -> Path | None:
    """The local folder of the reference model, where the policy has this folder and chat; None when the loss has no KL
    term.

    Raises ConfigError when its vocabulary is not the policy's, or reaches past its own embedding.
    """
    model = loaded.config.model
    if loaded.config.loss.kl_coef == 0:
        return None
    if model.reference_path is None:
        return policy
    reference = _folder(loaded, "model.reference_path", model.reference_path)
    its_chat = Chat(reference)
    _check_embedding(loaded, "model.reference_path", model.reference_path, reference, its_chat)
    ours, theirs = chat.vocabulary, its_chat.vocabulary
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
    with blamed(key, path, loaded.origin):
        return model_folder(path)
