"""Run files: what wins over what, what YAML values mean, where each value came from, and `explain` that loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import RunConfig, load_config
from common.config.explain import explain, forbidden_changes
from common.config.method import CLIP_DEFAULTS
from tests.training import ROOT

RUN_FILE = """\
run:
  dir: runs/test
  steps: 3
backend: {name: torch}
model:
  path: some/model
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
      weight: 0.5
rollout:
  prompts_per_step: 4
  group_size: 8
  max_new_tokens: 16
rewards:
  verifiers:
    answer: {rule: answer, options: {extract: boxed}}
  recipe:
    general_rule: {answer: 1.0}
batch: {row_tokens: 2048, rows_per_microbatch: 1}
optimizer: {}
"""


def write(folder: Path, **files: str) -> list[Path]:
    """YAML files by stem, as paths in the order given."""
    paths = [folder / f"{stem}.yaml" for stem in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write(tmp_path, run=RUN_FILE)[0]


def layered(run_file: Path, text: str, *words: str) -> RunConfig:
    """The config of the run file with another file and overrides on top."""
    return load_config([run_file, *write(run_file.parent, layer=text)], words).config


# What wins ------------------------------------------------------------------------------------------------------------


def test_later_wins(tmp_path: Path) -> None:
    write(tmp_path, base=RUN_FILE, first="run: {seed: 1}", second="run: {seed: 2}")
    with_file = "include: [base.yaml, first.yaml, second.yaml]\nrun: {seed: 3}"
    without = "include: [base.yaml, first.yaml, second.yaml]"
    main, bare, last = write(tmp_path, main=with_file, bare=without, last="run: {seed: 4}")
    assert load_config([bare]).config.run.seed == 2
    assert load_config([main]).config.run.seed == 3
    assert load_config([main, last]).config.run.seed == 4
    assert load_config([last, main]).config.run.seed == 3
    assert load_config([main, last], ["run.seed=5"]).config.run.seed == 5
    assert load_config([main, last], ["run.seed=5", "run.seed=6"]).config.run.seed == 6


def test_includes_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", base=RUN_FILE, outer="include: [base.yaml]\nrun: {seed: 7}")
    (main,) = write(tmp_path, main="include: [parts/outer.yaml]")
    assert load_config([main]).config.run.seed == 7


def test_a_file_may_be_included_twice(tmp_path: Path) -> None:
    write(tmp_path, base=RUN_FILE, one="include: [base.yaml]", two="include: [base.yaml]\nrun: {seed: 7}")
    assert load_config(write(tmp_path, main="include: [one.yaml, two.yaml]")).config.run.seed == 7


def test_tables_merge_and_lists_replace(run_file: Path) -> None:
    config = layered(run_file, "data: {train: [{path: c.jsonl}], max_prompt_tokens: 9}\nrun: {steps: 5}")
    assert [source.path for source in config.data.train] == ["c.jsonl"]
    assert (config.run.dir, config.run.steps) == ("runs/test", 5)


def test_terms_of_a_label_and_verdicts_of_a_judge_replace_as_lists_do(run_file: Path) -> None:
    judge = "{server: s, prompts: {en: {user: '{response}'}}, read_out: {type: labels, verdicts: {a: 1, b: 0}}}"
    first = (
        f"{{recipe: {{general_rule: {{other: 1}}}}, judges: {{j: {judge}}}, verifiers: {{other: {{rule: language}}}}}}"
    )
    again = "rewards: {recipe: {general_rule: {answer: 2}}, judges: {j: {read_out: {verdicts: {c: 1, d: 0}}}}}"
    server = "servers: {s: {engine: in_process, model: m}}"
    files = [run_file, *write(run_file.parent, first=f"rewards: {first}", again=again, server=server)]
    rewards = load_config(files).config.rewards
    assert rewards.recipe == {"general_rule": {"answer": 2.0}}
    assert rewards.judges["j"].read_out.verdicts == {"c": 1.0, "d": 0.0}
    assert rewards.judges["j"].read_out.type == "labels"
    rewards = load_config(files, ["rewards.recipe.general_rule.other=0.5"]).config.rewards
    assert rewards.recipe == {"general_rule": {"answer": 2.0, "other": 0.5}}


def test_a_replaced_judge_or_verifier_keeps_nothing_of_the_first(run_file: Path) -> None:
    prompts = "{en: {user: 'old {response}'}, zh: {user: '旧 {response}'}}"
    judge = f"{{server: s, prompts: {prompts}, read_out: {{type: number, grades: [0, 1], max_tokens: 9}}}}"
    verifier = "{rule: answer, options: {extract: boxed}}"
    first = f"rewards: {{judges: {{j: {judge}}}, verifiers: {{v: {verifier}, w: {verifier}}}}}"
    again = (
        "rewards: {judges: {j: {prompts: {en: {user: 'new {response}'}}, read_out: {type: scalar}}}, "
        "verifiers: {v: {judge: j}, w: {rule: language}}}"
    )
    server = "servers: {s: {engine: in_process, model: m}}"
    rewards = load_config([run_file, *write(run_file.parent, first=first, again=again, server=server)]).config.rewards
    assert list(rewards.judges["j"].prompts) == ["en"]
    assert rewards.judges["j"].read_out.model_fields_set == {"type"}
    assert (rewards.verifiers["v"].rule, rewards.verifiers["v"].options) == (None, {})
    assert rewards.verifiers["w"].options == {}


def test_what_is_said_again_changes_nothing_else(run_file: Path) -> None:
    first = (
        "rewards: {judges: {j: {server: s, prompts: {en: {user: '{response}'}}, read_out: {type: verdict, verdicts: "
        "{a: 1, b: 0}}}}, verifiers: {v: {rule: answer, options: {extract: boxed}}}}"
    )
    again = "rewards: {judges: {j: {read_out: {type: verdict, max_tokens: 64}}}, verifiers: {v: {rule: answer}}}"
    server = "servers: {s: {engine: in_process, model: m}}"
    rewards = load_config([run_file, *write(run_file.parent, first=first, again=again, server=server)]).config.rewards
    assert rewards.judges["j"].read_out.verdicts == {"a": 1.0, "b": 0.0}
    assert rewards.judges["j"].read_out.max_tokens == 64
    assert rewards.verifiers["v"].options == {"extract": "boxed"}


def test_an_override_merges_tables_and_makes_missing_ones(run_file: Path) -> None:
    words = ["rewards.verifiers={short: {rule: answer}}", "rewards.recipe.other.short=2", "loss.importance.cap=3"]
    config = load_config([run_file], words).config
    assert sorted(config.rewards.verifiers) == ["answer", "short"]
    assert config.rewards.recipe == {"general_rule": {"answer": 1.0}, "other": {"short": 2.0}}
    assert config.loss.importance.cap == 3


def test_a_value_replaces_a_table_and_the_other_way_round(run_file: Path) -> None:
    options = "rewards: {verifiers: {answer: {options: {extract: {deep: 1}}}}}"
    config = layered(run_file, options)
    assert config.rewards.verifiers["answer"].options == {"extract": {"deep": 1}}
    config = layered(run_file, options, "rewards.verifiers.answer.options.extract=boxed")
    assert config.rewards.verifiers["answer"].options == {"extract": "boxed"}


# What values mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("0x10", 16),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("012", 12),
        ("0o12", 10),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("'5'", "5"),
        ("&anchor true", True),
        ("&anchor 1e-6", 1e-6),
        ("[1, [no, 2.5]]", [1, ["no", 2.5]]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_yaml_1_2(text: str, value: Any, run_file: Path) -> None:
    key = "rewards.verifiers.answer.options.extract"
    for config in (
        layered(run_file, f"rewards: {{verifiers: {{answer: {{options: {{extract: {text}}}}}}}}}"),
        load_config([run_file], [f"{key}={text}"]).config,
    ):
        found = config.rewards.verifiers["answer"].options["extract"]
        assert (found, type(found)) == (value, type(value))


def test_anchors_and_merge_keys(run_file: Path) -> None:
    text = "rewards:\n  verifiers:\n    one: &one {rule: answer}\n    two: {<<: *one, options: {extract: boxed}}\n"
    loaded = load_config([run_file, *write(run_file.parent, layer=text)])
    two = loaded.config.rewards.verifiers["two"]
    assert (two.rule, two.options) == ("answer", {"extract": "boxed"})
    assert loaded.origin("rewards.verifiers.two.rule") == f"{run_file.parent / 'layer.yaml'}:4"


def test_a_whole_number_is_a_fine_float_and_an_equals_sign_a_fine_character(run_file: Path) -> None:
    config = load_config([run_file], ["optimizer.learning_rate=1", "model.system=a=b"]).config
    assert (config.optimizer.learning_rate, config.model.system) == (1.0, "a=b")


def test_each_loss_brings_its_own_clip_unless_one_is_given(run_file: Path) -> None:
    for kind, clip in CLIP_DEFAULTS.items():
        loss = load_config([run_file], [f"loss.type={kind}"]).config.loss
        assert (loss.clip_low, loss.clip_high) == clip
    loss = load_config([run_file], ["loss.type=gspo", "loss.clip_high=0.5"]).config.loss
    assert (loss.clip_low, loss.clip_high) == (CLIP_DEFAULTS["gspo"][0], 0.5)
    assert loss.aggregation == "sequence_mean"


def test_a_config_cannot_be_changed(run_file: Path) -> None:
    config = load_config([run_file]).config
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 3  # pyright: ignore


# Origins --------------------------------------------------------------------------------------------------------------


def test_origin_of_every_kind_of_key(run_file: Path) -> None:
    layer = "rollout:\n  stop:\n    - a\n    - b\nmodel: {system: Be kind.}\n"
    (path,) = write(run_file.parent, layer=layer)
    loaded = load_config([run_file, path], ["run.steps=9", "loss.importance={cap: 3}", "checkpoint.every=2"])
    assert {
        key: loaded.origin(key)
        for key in (
            *("run.dir", "run.steps", "run.seed", "data.train.0.path", "data.train.1.path", "data.train.1.weight"),
            *("data.train.0.weight", "rollout.stop", "rollout.stop.1", "model.path", "model.system", "loss.type"),
            *("loss.importance.cap", "loss.importance.low", "checkpoint.every", "checkpoint.keep"),
            *("rewards.verifiers.answer.options.extract", "rewards.verifiers.answer.options", "backend.name"),
        )
    } == {
        "run.dir": f"{run_file}:2",
        "run.steps": "command line",
        "run.seed": "default",
        "data.train.0.path": f"{run_file}:9",
        "data.train.1.path": f"{run_file}:10",
        "data.train.1.weight": f"{run_file}:11",
        "data.train.0.weight": "default",
        "rollout.stop": f"{path}:2",
        "rollout.stop.1": f"{path}:4",
        "model.path": f"{run_file}:6",
        "model.system": f"{path}:5",
        "loss.type": "default",
        "loss.importance.cap": "command line",
        "loss.importance.low": "default",
        "checkpoint.every": "command line",
        "checkpoint.keep": "default",
        "rewards.verifiers.answer.options.extract": f"{run_file}:18",
        "rewards.verifiers.answer.options": f"{run_file}:18",
        "backend.name": f"{run_file}:4",
    }


def test_a_replaced_list_leaves_no_origins_behind(run_file: Path) -> None:
    loaded = load_config([run_file], ["data.train=[{path: c.jsonl}]"])
    assert loaded.origin("data.train.0.path") == "command line"
    assert not [key for key in loaded.origins if key.startswith("data.train.1")]


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key that holds a plain value."""
    if isinstance(value, dict):
        pairs = [(f"{prefix}{key}", entry) for key, entry in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}{index}", entry) for index, entry in enumerate(value)]
    else:
        return {prefix[:-1]: value}
    return {key: leaf for name, entry in pairs for key, leaf in leaves(entry, f"{name}.").items()}


def test_every_set_value_has_the_line_that_holds_it(run_file: Path) -> None:
    loaded = load_config([run_file])
    lines = run_file.read_text().splitlines()
    found = 0
    for key, value in leaves(loaded.config.model_dump()).items():
        file, _, line = loaded.origin(key).rpartition(":")
        if file:
            assert file == str(run_file)
            assert f"{key.rpartition('.')[2]}: {value}" in lines[int(line) - 1]
            found += 1
    assert found == 15


# Explain --------------------------------------------------------------------------------------------------------------


def reload(folder: Path, text: str) -> RunConfig:
    return load_config(write(folder, explained=text)).config


def test_explain_gives_each_value_its_origin(run_file: Path) -> None:
    text = explain(load_config([run_file], ["rollout.stop=[no, '1e-6']"]))
    lines = [line.strip() for line in text.splitlines()]
    assert f"dir: runs/test # {run_file}:2" in lines
    assert "seed: 0 # default" in lines
    assert "system: null # default" in lines
    assert f"- path: a.jsonl # {run_file}:9" in lines
    assert f"weight: 0.5 # {run_file}:11" in lines
    assert "stop: [no, '1e-6'] # command line" in lines
    assert all("#" in line or line.endswith(":") for line in lines)


def test_explained_config_loads_again(run_file: Path, tmp_path: Path) -> None:
    words = ["loss.type=gspo", "rewards.verifiers.answer.options={deep: [{a: [1, no]}, [2.5, null], {}], e: []}"]
    loaded = load_config([run_file], words)
    assert reload(tmp_path, explain(loaded)) == loaded.config


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t #:'\"-")))
def test_any_text_survives_explain(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "explain"
    folder.mkdir(exist_ok=True)
    (path,) = write(folder, run=RUN_FILE)
    loaded = load_config([path])
    model = loaded.config.model.model_copy(update={"system": text})
    rollout = loaded.config.rollout.model_copy(update={"stop": [text, "b"]})
    config = loaded.config.model_copy(update={"model": model, "rollout": rollout})
    assert reload(folder, explain(type(loaded)(config, loaded.origins, loaded.engine))) == config


def test_what_a_resumed_run_may_change(run_file: Path) -> None:
    before = load_config([run_file]).config
    allowed = ["run.dir=other", "run.steps=99", "checkpoint.keep=5", "evaluation.samples=1", "metrics.sample_every=7"]
    allowed += ["rewards.max_missing=3", "rewards.max_attack_gain=0.1", "rewards.attack_report=other.json"]
    allowed += ["backend.offload_optimizer=true", "backend.offload_reference=true", "backend.recompute=full"]
    assert forbidden_changes(before, load_config([run_file], allowed).config) == []
    words = ["run.seed=1", "data.train=[{path: c.jsonl}]", "rewards.recipe.more={answer: 0.5}"]
    changes = forbidden_changes(before, load_config([run_file], words).config)
    assert [line.split(":")[0] for line in changes] == ["data.train", "rewards.recipe.more.answer", "run.seed"]
    assert "run.seed: was 0, is 1" in changes


def test_the_order_of_verdicts_is_that_of_a_heads_outputs() -> None:
    verdicts = "rewards.judges.value_small.read_out.verdicts"
    before, after = (
        load_config([ROOT / "configs" / "quickstart.yaml"], [f"{verdicts}={table}"]).config
        for table in ("{good: 1.0, bad: 0.0}", "{bad: 0.0, good: 1.0}")
    )
    assert forbidden_changes(before, after) == [f"{verdicts} in their order: was ['good', 'bad'], is ['bad', 'good']"]
