"""Every mistake in a run file or an override is one sentence naming the place, the key, its value and the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import ConfigError, load_config

RUN_FILE = """\
run: {dir: runs/test, steps: 3}
backend: {name: torch}
model: {path: some/model}
data: {train: [{path: a.jsonl}]}
rollout: {prompts_per_step: 4, group_size: 8, max_new_tokens: 16}
rewards:
  verifiers: {answer: {rule: answer, options: {extract: boxed}}}
  recipe: {general_rule: {answer: 1.0}}
batch: {row_tokens: 2048, rows_per_microbatch: 1}
optimizer: {learning_rate: 1e-6}
loss: {updates_per_rollout: 2, old_logprobs: sampler}
"""


class Case(NamedTuple):
    """One line of a run file, and what its error must say: the key, its value as shown, and words of the remedy."""

    line: str
    key: str
    value: str
    remedy: str


def message(folder: Path, text: str, *words: str, start: str = RUN_FILE) -> str:
    """The complaint about a file laid over the run file."""
    paths = [folder / "run.yaml", folder / "layer.yaml"]
    for path, content in zip(paths, (start, text), strict=True):
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(paths, words)
    return str(caught.value)


def word(line: str) -> str:
    """`{a: {b: c}}` in a run file, as `a.b=c`, for the lines of this module: one key a table down to the last."""
    keys = []
    while line.startswith("{"):
        key, _, line = line[1:-1].partition(": ")
        keys.append(key)
        if key in ("x", "train", "recipe"):
            break
    return f"{'.'.join(keys)}={line}"


VALUES = [
    Case("{run: {steps: true}}", "run.steps", "true", "must be a whole number. Write it"),
    Case("{run: {steps: 1e-5}}", "run.steps", "1e-05", "must be a whole number. Write it"),
    Case("{run: {steps: 2.0}}", "run.steps", "2.0", "must be a whole number. Write it"),
    Case("{run: {steps: '2'}}", "run.steps", "'2'", "must be a whole number. Write it without quotes"),
    Case("{run: {steps: 0}}", "run.steps", "0", "must be at least 1. Raise it"),
    Case("{run: {dir: 5}}", "run.dir", "5", "must be text. Put it in quotes"),
    Case("{advantage: {ddof: true}}", "advantage.ddof", "true", "must be a whole number. Write it"),
    Case("{advantage: {ddof: 2}}", "advantage.ddof", "2", "must be at most 1. Lower it"),
    Case("{advantage: {eps: 0}}", "advantage.eps", "0", "must be greater than 0.0. Raise it"),
    Case("{optimizer: {learning_rate: true}}", "optimizer.learning_rate", "true", "must be a number. Write it"),
    Case("{optimizer: {learning_rate: .inf}}", "optimizer.learning_rate", "inf", "must be a finite number. Choose"),
    Case("{optimizer: {beta1: 1}}", "optimizer.beta1", "1", "must be less than 1.0. Lower it"),
    Case("{optimizer: {beta2: 1.0}}", "optimizer.beta2", "1.0", "must be less than 1.0. Lower it"),
    Case("{loss: {clip_high: 0}}", "loss.clip_high", "0", "must be greater than 0.0. Raise it"),
    Case("{batch: {packed: 1}}", "batch.packed", "1", "must be true or false. Write one of the two"),
    Case("{backend: {name: tf}}", "backend.name", "'tf'", "must be 'torch' or 'jax'. Choose one"),
    Case("{loss: {type: [ppo_clip]}}", "loss.type", "['ppo_clip']", "'gspo', 'cispo' or 'cross_entropy'. Choose"),
    Case(
        "{rollout: {stop: text}}",
        "rollout.stop",
        "'text'",
        "must be a list. Write [first, second], in quotes what holds a bracket.",
    ),
    Case("{rollout: {stop: [a, 5]}}", "rollout.stop.1", "5", "must be text. Put it in quotes"),
    Case("{rollout: 5}", "rollout", "5", "must be a table. Write its keys below it"),
    Case("{rollout: null}", "rollout", "null", "must be a table. Write its keys below it"),
    Case("{rewards: {verifiers: [a]}}", "rewards.verifiers", "['a']", "must be a table. Write its keys below it"),
    Case("{data: {train: []}}", "data.train", "[]", "must have at least 1 entries. Add what is missing"),
    Case("{data: {train: [{path: 3}]}}", "data.train.0.path", "3", "must be text. Put it in quotes"),
    Case("{data: {train: [{path: a}, {path: b, weight: 0}]}}", "data.train.1.weight", "0", "greater than 0.0. Raise"),
    Case("{rewards: {recipe: {l: {a: no}}}}", "rewards.recipe.l.a", "'no'", "must be a number. Write it"),
    Case("{backend: {torch: {compile: 1}}}", "backend.torch.compile", "1", "must be true or false. Write one"),
    Case("{backend: {jax: {mesh: {fsdp: 0}}}}", "backend.jax.mesh.fsdp", "0", "must be at least 1. Raise it"),
    Case("{loss: {kl_type: k1_loss}}", "loss.kl_type", "'k1_loss'", "only adds noise; use k2_loss"),
    Case("{loss: {kl_type: k3_reward}}", "loss.kl_type", "'k3_reward'", "training collapses; use k1_reward or k3_loss"),
    Case("{loss: {kl_type: [k1_loss]}}", "loss.kl_type", "['k1_loss']", "must be 'k1_reward', 'k2_loss', 'k3_loss'"),
]

CROSS_CHECKS = [
    Case("{rollout: {group_size: 1}}", "rollout.group_size", "1", "at least 2 responses per prompt. Set it to 2 or"),
    Case("{batch: {row_tokens: 100}}", "batch.row_tokens", "100", "up to 1040 tokens (data.max_prompt_tokens + r"),
    Case("{rollout: {prompts_per_step: 5}}", "rollout.prompts_per_step", "5", "Choose a multiple of 2"),
    Case("{loss: {old_logprobs: detach}}", "loss.old_logprobs", "'detach'", "Set it to recompute or sampler"),
    Case("{loss: {importance: {type: icepop}}}", "loss.importance.type", "'icepop'", "Set loss.old_logprobs to recomp"),
    Case("{loss: {clip_low: 1}}", "loss.clip_low", "1.0", "must stay above 0. Choose below 1"),
    Case("{rollout: {temperature: 0}}", "rollout.temperature", "0.0", "responses that differ. Choose a temperature ab"),
    Case("{evaluation: {every: 5}}", "data.heldout", "[]", "has no prompts. Name a file"),
    Case("{rewards: {recipe: {l: {anser: 1}}}}", "rewards.recipe.l.anser", "1.0", "Known: answer. Add it under rewa"),
    Case("{rewards: {recipe: {l: {}}}}", "rewards.recipe.l", "{}", "every response would score 0. Name a verifier"),
    Case(
        "{rewards: {verifiers: {x: {judge: j}}}}", "rewards.verifiers.x.judge", "'j'", "Known: none. Include its file"
    ),
    Case(
        "{rewards: {verifiers: {x: {rule: overlong, options: {max_length: 4096}}}}}",
        "rewards.verifiers.x.options.max_length",
        "4096",
        "so the full penalty is never reached. Set it to ",
    ),
    Case("{rewards: {verifiers: {x: {options: {}}}}}", "rewards.verifiers.x", "{'rule': None", "Set exactly one of"),
]
# What another key makes wrong is blamed on the place that set it, not on the line of the case.
ELSEWHERE = {"data.heldout": "default"}


def test_an_axis_that_is_not_served_yet_is_refused(tmp_path: Path) -> None:
    text = message(tmp_path, "backend: {name: jax, jax: {mesh: {context: 2}}}")
    assert text.startswith("backend.jax.mesh.context = 2")
    assert "yet. Set it to 1, and" in text


@pytest.mark.parametrize("case", VALUES + CROSS_CHECKS, ids=lambda case: case.line)
def test_wrong_value(case: Case, tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    text = message(tmp_path, f"# a comment\n{case.line}")
    assert text.startswith(f"{case.key} = {case.value}")
    assert f" ({ELSEWHERE.get(case.key, f'{layer}:2')}): " in text
    assert case.remedy in text
    assert "\n" not in text
    assert text.endswith(".")
    from_word = message(tmp_path, "run: {}", word(case.line))
    assert from_word == text.replace(f"({layer}:2)", "(command line)")


@pytest.mark.parametrize(
    ("line", "start", "end"),
    [
        ("{type: gspo, aggregation: token_mean}", "loss.aggregation = 'token_mean'", "Set it to sequence_mean, or"),
        ("{type: cross_entropy, kl_coef: 1, kl_type: k1_reward}", "loss.kl_type = 'k1_reward'", "Set it to k3_loss."),
    ],
)
def test_losses_refuse_what_they_would_ignore(line: str, start: str, end: str, tmp_path: Path) -> None:
    text = message(tmp_path, f"loss: {line}")
    assert text.startswith(f"{start} ({tmp_path / 'layer.yaml'}:1): ")
    assert end in text


@pytest.mark.parametrize(
    ("line", "key", "hint"),
    [
        ("rolout: {group_size: 3}", "rolout", "Did you mean 'rollout'?"),
        ("rollout: {grup_size: 3}", "rollout.grup_size", "Did you mean 'group_size'?"),
        ("data: {train: [{path: a, wieght: 1}]}", "data.train.0.wieght", "Did you mean 'weight'?"),
        ("loss: {importance: {capp: 1}}", "loss.importance.capp", "Did you mean 'cap'?"),
        ("rewards: {verifiers: {a: {rul: 1}}}", "rewards.verifiers.a.rul", "Did you mean 'rule'?"),
        ("backend: {torch: {compil: true}}", "backend.torch.compil", "Did you mean 'compile'?"),
        ("backend: {jax: {x: 1}}", "backend.jax.x", "Known keys here: mesh."),
        ("run: {x: 1}", "run.x", "Known keys here: deadline_s, dir, seed, steps."),
        ("batch: {group_size: 3}", "batch.group_size", "Did you mean 'rollout.group_size'?"),
        ("group_sise: 3", "group_sise", "Did you mean 'rollout.group_size'?"),
        ("run: {prompts: 3}", "run.prompts", "Did you mean 'rollout.prompts_per_step'?"),
        ("run: {keep: 3}", "run.keep", "Did you mean 'checkpoint.keep'?"),
        ("backend: {sharding: zero2}", "backend.sharding", "Did you mean 'backend.torch.sharding'?"),
        ("fsdp: 4", "fsdp", "Did you mean 'backend.jax.mesh.fsdp'?"),
        ("run: {every: 3}", "run.every", "Did you mean 'checkpoint.every' or 'ema.every' or 'evaluation.every'?"),
        ("rollout: {row: 3}", "rollout.row", "Did you mean 'rows'?"),
        ("evaluation: {sample: 3}", "evaluation.sample", "Did you mean 'samples'?"),
        (
            "rewards: {verifiers: {a: {steps: 1}}}",
            "rewards.verifiers.a.steps",
            "Known keys here: judge, options, reward_model, rule.",
        ),
    ],
)
def test_unknown_key(line: str, key: str, hint: str, tmp_path: Path) -> None:
    expected = f"{key} ({tmp_path / 'layer.yaml'}:1): is not a key of the config. {hint}"
    assert expected in message(tmp_path, line).splitlines()


def test_missing_key_names_the_table_that_lacks_it(tmp_path: Path) -> None:
    start = RUN_FILE.replace(", steps: 3", "")
    text = message(tmp_path, "data:\n  train:\n    - weight: 1.0\n", start=start)
    layer = tmp_path / "layer.yaml"
    assert text.splitlines() == [
        f"run.steps ({tmp_path / 'run.yaml'}:1): is not set and has no default. Set it in a run file or as "
        "run.steps=value.",
        f"data.train.0.path ({layer}:3): is not set and has no default. Set it in a run file or as "
        "data.train.0.path=value.",
    ]


def test_missing_table_names_the_files(tmp_path: Path) -> None:
    text = message(tmp_path, "run: {}", start=RUN_FILE.replace("model: {path: some/model}\n", ""))
    files = f"{tmp_path / 'run.yaml'}, {tmp_path / 'layer.yaml'}"
    assert text == f"model ({files}): is not set and has no default. Include a file that has this table."


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = message(tmp_path, "run: {steps: x, seed: -1}\nrollout: {rows: 0}")
    assert [line.split(" ")[0] for line in text.splitlines()] == ["run.steps", "run.seed", "rollout.rows"]


@pytest.mark.parametrize(
    ("text", "start", "rest"),
    [
        ("run:\n  dir: [a\n", ":3: is not valid YAML: expected", "Correct the file there."),
        ("run: {}\nrun: {}\n", ':2: is not valid YAML: found duplicate key "run"', "Correct the file there."),
        ("run:\n\tdir: a\n", ":2: is not valid YAML: found character '\\t'", "Correct the file there."),
        ("- a\n", ": holds a list, not a table of keys.", "Write `section:` tables."),
        ("just text\n", ": holds a str, not a table of keys.", "Write `section:` tables."),
        ("", ": holds nothing, not a table of keys.", "Write `section:` tables."),
    ],
)
def test_bad_yaml(text: str, start: str, rest: str, tmp_path: Path) -> None:
    found = message(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'layer.yaml'}{start}")
    assert found.endswith(rest)


@pytest.mark.parametrize(
    ("line", "key", "remedy"),
    [
        ("1: {a: b}", "1", "is no text. Put it in quotes."),
        ("run: {true: 1}", "True", "is no text. Put it in quotes."),
        ("data: {train: [{2: 1}]}", "2", "is no text. Put it in quotes."),
        ("rewards: {recipe: {a.b: {}}}", "'a.b'", "holds a dot, which joins keys. Choose another name."),
    ],
)
def test_bad_key(line: str, key: str, remedy: str, tmp_path: Path) -> None:
    text = message(tmp_path, line)
    assert text.startswith(f"key {key} ({tmp_path / 'layer.yaml'}:1): ")
    assert text.endswith(remedy)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    file, layer = tmp_path / "nowhere.yaml", tmp_path / "layer.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert str(caught.value) == f"{file}: no such config file. Give the path of a YAML run file."
    assert "must be a list of file paths." in message(tmp_path, 'include: ["\\0"]')
    text = message(tmp_path, "include: [nowhere.yaml]")
    assert text == f"{file}, included by {layer}: no such config file. Give the path of a YAML run file."
    file.write_bytes(b"run: {dir: \xff}")
    assert f"{file}, included by {layer}: cannot be read ('utf-8'" in message(tmp_path, "include: [nowhere.yaml]")
    os.remove(file)
    file.mkdir()
    assert f"{file}, included by {layer}: cannot be read (" in message(tmp_path, "include: [nowhere.yaml]")


def test_no_file_at_all() -> None:
    with pytest.raises(ConfigError, match=r"^no run file was given\. Name one, for example configs/\w+\.yaml\.$"):
        load_config([], ["run.steps=3"])


@pytest.mark.parametrize("include", ["base.yaml", "5", "[1]", "{a: b}"])
def test_include_that_is_no_list_of_files(include: str, tmp_path: Path) -> None:
    text = message(tmp_path, f"run: {{}}\ninclude: {include}\n")
    assert text.startswith("include = ")
    assert f" ({tmp_path / 'layer.yaml'}:2): must be a list of file paths. Write include: [file.yaml, ...]." in text


def test_include_cycle(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("include: [two.yaml]")
    (tmp_path / "two.yaml").write_text("include: [layer.yaml]")
    text = message(tmp_path, "include: [one.yaml]")
    expected = f"include = 'layer.yaml' ({tmp_path / 'two.yaml'}): {tmp_path / 'layer.yaml'} then includes itself."
    assert text == f"{expected} Remove one of the includes."


@pytest.mark.parametrize("bad", ["run.steps", "=3", "run..steps=3", ".steps=3", "run.=3", ""])
def test_override_that_is_none(bad: str, tmp_path: Path) -> None:
    text = message(tmp_path, "run: {}", bad)
    assert text == f"{bad!r} (command line): is neither a config file nor key=value. Write section.key=value."


@pytest.mark.parametrize(
    ("bad", "name", "last"), [("data.train.0.path=x", "data.train", "path"), ("run.dir.x=1", "run.dir", "x")]
)
def test_override_below_a_value(bad: str, name: str, last: str, tmp_path: Path) -> None:
    text = message(tmp_path, "run: {}", bad)
    assert text == f"{bad!r} (command line): {name} is no table, so {last!r} is no key. Set it whole: {name}=..."


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    text = message(tmp_path, f"run: {{steps: {'x' * 5000}}}")
    assert len(text) < 400
    assert text.startswith("run.steps = 'xxx")
