"""A resolved config as YAML, each value with the place that set it; and what two configs disagree on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from common.config.launching import LaunchSection
from common.config.load import LoadedConfig
from common.config.run import RunConfig

# What a resumed run may change: none of it alters what an earlier step computed, and the engine, how its devices share
# the work and how much they take at a time, alter what a later one does by rounding alone.
MAY_CHANGE = re.compile(
    r"run\.(dir|steps)|(checkpoint|ema|evaluation|metrics)\..*|rewards\.(on_missing|max_missing|deadline_s|cache)|"
    r"backend\.(name|threads|recompute|offload_(optimizer|reference)|(torch|jax)(\..*)?)|"
    r"batch\.rows_per_microbatch|rollout\.rows|"
    r"rewards\.(attack_cases|attack_report|max_attack_gain)|"
    r"servers\.[^.]+\.(urls|api_key_env|concurrency|deadline_s|retries|launch(\.\S+)?)"
)
_LAUNCH = re.compile(r"servers\.[^.]+\.launch")


def explain(loaded: LoadedConfig) -> str:
    """The resolved config as a YAML document that loads again, each value followed by `# origin`."""
    text = io.StringIO()
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 10_000
    yaml.dump(_explained(loaded.config.model_dump(), loaded, ""), text)
    return text.getvalue()


def explain_recipe(config: RunConfig) -> Iterator[str]:
    """For each label how its total is made and what its advantages are; then what each verifier of them is."""
    rewards = config.rewards
    for label, terms in rewards.recipe.items():
        gates = rewards.gates.get(label, ())
        total = " + ".join(f"{weight:g} {name}" for name, weight in terms.items())
        total = " x ".join([f"({total})", *gates]) if gates else total
        yield f"{label} = {total}; advantages: {config.advantage.labels.get(label, config.advantage.type)}"
    for name in dict.fromkeys(name for label in rewards.recipe for name in rewards.verifiers_of(label)):
        yield f"{name}: {_kind(config, name)}"


def _kind(config: RunConfig, name: str) -> str:
    verifier = config.rewards.verifiers[name]
    if not verifier.judge:
        return f"rule {verifier.rule}" if verifier.rule else f"reward model {verifier.reward_model}"
    judge = config.rewards.judges[verifier.judge]
    server = config.servers[judge.server]
    return f"judge {verifier.judge}, {judge.read_out.type} of {server.model} ({server.engine})"


class _Representer(RoundTripRepresenter):
    """Writes null where ruamel would write nothing."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _explained(value: Any, loaded: LoadedConfig, prefix: str) -> Any:
    """Tables and lists of tables as ruamel's own types, the origin behind each other value."""
    if isinstance(value, dict):
        node, entries = CommentedMap(value), value.items()
    else:
        node, entries = CommentedSeq(value), enumerate(value)
    for key, entry in entries:
        if _holds_tables(entry):
            node[key] = _explained(entry, loaded, f"{prefix}{key}.")
        else:
            node[key] = _on_one_line(entry)
            node.yaml_add_eol_comment(loaded.origin(f"{prefix}{key}"), key, column=0)
    return node


def _holds_tables(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_tables(entry) for entry in value)
    return isinstance(value, dict) and bool(value)


def _on_one_line(value: Any) -> Any:
    if isinstance(value, str) and (value.startswith("?") or not value.isprintable()):
        # ruamel would write the one bare, which a list reads as a key, and break the other at U+0085.
        return DoubleQuotedScalarString(value)
    if not isinstance(value, list):
        return value
    node = CommentedSeq(map(_on_one_line, value))
    node.fa.set_flow_style()
    return node


def forbidden_changes(saved: RunConfig, now: RunConfig) -> list[str]:
    """One line for each key that differs and must not, of a run that is being resumed."""
    before, after = dict(_leaves(saved.model_dump(), "")), dict(_leaves(now.model_dump(), ""))
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not MAY_CHANGE.fullmatch(key)
    ]


def _leaves(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if key == "verdicts":  # in a head the first verdict is the first output
            yield f"{prefix}{key} in their order", list(value)
        if _LAUNCH.fullmatch(f"{prefix}{key}") and value and (shaping := LaunchSection.model_validate(value).shaping):
            yield f"{prefix}{key}, what of it changes answers", shaping
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
