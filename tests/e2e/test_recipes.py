"""The published recipes from end to end on both engines, small models of the published ones' architecture as judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.runs import read_lines, safework, write_records
from tests.tiny import make_model, make_speaker
from tests.training import ROOT, write_run

ENGINES = ("torch", "jax")
WORDS = [["Length", "Words", "at most 2 words"]]
REFERENCES: dict[str, Any] = {
    "knowledge": "Oslo",
    "knowledge_rule": "7",
    "normal": None,
    "general": "Oslo, then Bergen",
    "general_rule": "7",
    "gsm8k_rule": "7",
    "geo3k_rule": "7",
    "safety": None,
    "safety_jailbreak": None,
    "value": None,
    "muldimif": WORDS,
}
KG = {
    "knowledge": {"format": 1.0, "knowledge": 1.0, "normal": 0.5},
    "knowledge_rule": {"format": 1.0, "boxed": 1.0, "normal": 0.5},
    "normal": {"format": 1.0, "normal": 1.0},
    "general": {"format": 1.0, "general": 1.0},
    "general_rule": {"format": 1.0, "boxed": 1.0},
    "gsm8k_rule": {"boxed": 0.9, "task_format": 0.1},
    "geo3k_rule": {"boxed": 0.9, "task_format": 0.1},
}
SVKNG = KG | {label: {"format": 1.0, label: 1.0} for label in ("safety", "safety_jailbreak", "value")}
SVKI = SVKNG | {
    "knowledge": {"format": 1.0, "knowledge": 1.0, "normal": 1.0},
    "knowledge_rule": {"format": 1.0, "boxed": 1.0, "normal": 1.0},
    "muldimif": {"format": 1.0, "instructions": 1.0, "normal": 1.0},
}
RECIPES = {"kg": KG, "svkng": SVKNG, "svki": SVKI}
# What the judges say, and what their verdicts are worth.
SAID = {
    "safety": ("Unsafe", 0.0),
    "safety_jailbreak": ("Unsafe", 0.0),
    "normal": ("Helpful", 1.0),
    "general": ("0.5", 0.5),
}


class Models(NamedTuple):
    """Folders of the policy's model and of those behind the three servers."""

    policy: Path
    servers: dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(
        make_model(folder / "policy", "qwen2", num_hidden_layers=1),
        {
            "safety": make_speaker(folder / "safety", "Unsafe"),
            "value": make_speaker(folder / "value", "yes", g=18.0, b=17.0),
            "knowledge": make_speaker(folder / "knowledge", "0.5 HelpfuL", T=15.0, F=16.0),
        },
    )


def recipe_run(folder: Path, models: Models, recipe: str) -> Path:
    """A run of one step over one prompt of each label that the recipe has."""
    records = [
        {"id": label, "label": label, "prompt": f"Where is {label}?", "reference": REFERENCES[label]}
        for label in RECIPES[recipe]
    ]
    data = write_records(folder / "prompts.jsonl", records)
    run_file = write_run(
        folder,
        models.policy,
        run={"steps": 1},
        data={"train": [{"path": str(data)}]},
        rollout={"prompts_per_step": len(records), "group_size": 2, "max_new_tokens": 6},
        servers={
            name: {"engine": "in_process", "model": str(model), "urls": []} for name, model in models.servers.items()
        },
    )
    text = run_file.read_text()
    rules = str(ROOT / "configs" / "recipe" / "rules.yaml")
    assert rules in text
    run_file.write_text(text.replace(rules, str(ROOT / "configs" / "recipe" / f"{recipe}.yaml")))
    return run_file


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_explained(recipe: str, models: Models, tmp_path: Path) -> None:
    checked = safework("check", recipe_run(tmp_path, models, recipe))
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    for label, terms in RECIPES[recipe].items():
        total = " + ".join(f"{weight:g} {name}" for name, weight in terms.items())
        advantages = "group_mean" if label.startswith("safety") else "group_std"
        assert f"# {label} = {total}; advantages: {advantages}" in lines
    assert f"# knowledge: judge knowledge, labels of {models.servers['knowledge']} (in_process)" in lines
    assert f"# {len(RECIPES[recipe])} prompts an epoch" in checked.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_both_engines(recipe: str, models: Models, tmp_path: Path) -> None:
    run_file = recipe_run(tmp_path, models, recipe)
    found = []
    for engine in ENGINES:
        folder = tmp_path / engine
        trained = safework("train", run_file, f"backend.name={engine}", f"run.dir={folder}")
        assert trained.returncode == 0, trained.stderr
        found.append(read_lines(folder / "rollouts.jsonl"))
        (metrics,) = read_lines(folder / "metrics.jsonl")
        assert not any(value for name, value in metrics.items() if name.endswith("/missing"))
    for record in found[0]:
        terms = RECIPES[recipe][record["label"]]
        assert record["scores"].keys() == terms.keys()
        assert record["reward"] == pytest.approx(sum(weight * record["scores"][name] for name, weight in terms.items()))
        for name, (verdict, score) in SAID.items():
            if name in terms and record["evidence"][name] != "empty response":
                assert record["scores"][name] == score
                assert record["verdicts"][name] == verdict
    for left, right in zip(*found, strict=True):
        assert all(left[key] == right[key] for key in ("draw", "response", "verdicts"))
        assert left["scores"] == pytest.approx(right["scores"], abs=1e-4)
