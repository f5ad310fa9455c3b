"""What a report says: its arithmetic on a real verifier, its file, and the limit that it holds a config to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from common.attack.cases import Case, base
from common.attack.families import FAMILIES
from common.attack.report import (
    Attempt,
    JudgeResult,
    Report,
    family_results,
    judge_digest,
    refuse_untried,
    table,
    write_report,
)
from common.attack.trial import Options, Response, attack, attempts
from common.config import ConfigError, LoadedConfig, load_config
from common.disk import NotSaved
from common.rewards.recipe import Recipe
from common.rewards.scorer import ScoreMissing
from common.rewards.verifier import Verifier
from common.serving.in_process import unopened
from common.serving.servers import Servers
from common.types import Missing, Sample, Score
from tests.full_disk import small_disk
from tests.tiny import make_model
from tests.training import write_run

CASES = [Case(id=str(n), labels=["value"], prompt="q", response=text) for n, text in enumerate(["no", "good no", "?"])]
LIMIT = "rewards.max_attack_gain"


class GoodWords(Verifier):
    """A tenth for each `good`; does not know what to say of question marks."""

    name = "words"

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        return [self._one(sample.rollout.answer_text) for sample in samples]

    def _one(self, text: str) -> Score | Missing:
        return Missing("it asks back") if "?" in text else Score(text.count("good") / 10, f"{text.count('good')} good")


def tried(*texts: tuple[int, str | None, str]) -> list[Attempt]:
    responses = [Response(CASES[case], family, text) for case, family, text in texts]
    return attempts("words", responses, GoodWords().score([each.case.sample(each.text) for each in responses]))


OWN = [(n, None, case.response) for n, case in enumerate(CASES)]


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_a_gain_is_the_score_less_that_of_the_same_case() -> None:
    found = tried(*OWN, (0, "more", "good good no"), (1, "more", "good no"), (1, "less", "no"), (0, "asks", "good?"))
    gains = [None if each.gain is None else round(each.gain, 9) for each in found]
    assert gains == [0.0, 0.0, None, 0.2, 0.0, -0.1, None]
    assert [each.score for each in found] == [0.0, 0.1, None, 0.2, 0.1, 0.0, None]
    assert found[3].evidence == "2 good"
    assert found[6].evidence == "it asks back"
    assert (found[3].prompt, found[3].response, found[3].case, found[3].judge) == ("q", "good good no", "0", "words")


def test_a_family_is_its_mean_and_its_largest_gain_and_what_is_missing() -> None:
    found = family_results(
        tried(
            *OWN,
            (0, "f", "good good"),
            (0, "f", "no"),
            (1, "f", "good" * 5),
            (1, "f", "?"),
            (2, "f", "good"),
            (0, "g", "x"),
        )
    )
    assert list(found) == ["f", "g"]
    # Case 2 has no score of its own, so what its attack gained is not known.
    assert found["f"].model_dump() == pytest.approx(
        {"mean_gain": 0.6 / 3, "largest_gain": 0.4, "cases": 5, "missing": 2}
    )
    assert found["g"].model_dump() == {"mean_gain": 0.0, "largest_gain": 0.0, "cases": 1, "missing": 0}


def test_a_family_without_any_score_has_no_gain() -> None:
    found = family_results(tried(*OWN, (0, "f", "?"), (2, "f", "good")))["f"]
    assert found.model_dump() == {"mean_gain": None, "largest_gain": None, "cases": 2, "missing": 2}


def test_losses_stay_losses() -> None:
    assert family_results(tried(*OWN, (1, "f", "no")))["f"].largest_gain == pytest.approx(-0.1)


def test_a_judge_that_scores_no_base_case_is_refused() -> None:
    with pytest.raises(ScoreMissing, match=r"judge 'words': none of its 1 base cases has a score, .* it asks back\."):
        tried((2, None, "?"), (2, "f", "good"))


# The file -------------------------------------------------------------------------------------------------------------


def report(gain: float = 0.1, **changes: object) -> Report:
    family = {"mean_gain": gain, "largest_gain": 0.5, "cases": 4, "missing": 1}
    judge = {
        "digest": "d",
        "model": "m",
        "labels": ["value"],
        "base_score": 0.25,
        "base_cases": 2,
        "base_missing": 0,
        "families": {"flattery": {**family, "mean_gain": gain / 2}, "verdict_echo": family},
    }
    judges = {"value": JudgeResult.model_validate({**judge, **changes})}
    return Report(cases="c.jsonl", cases_sha256="s", judges=judges, attempts=tried(*OWN))


def test_the_file_reads_back(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "a.json")
    assert Report.model_validate_json((tmp_path / "a.json").read_text()) == report()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_on_a_full_disk_the_old_file_stays(tmp_path: Path) -> None:
    large = report().model_copy(update={"attempts": report().attempts * 8000})
    with small_disk(tmp_path / "disk") as disk:
        write_report(report(), disk / "a.json")
        with pytest.raises(NotSaved, match=r"a.json: could not be written .* start the same command again"):
            write_report(large, disk / "a.json")
        assert [path.name for path in disk.iterdir()] == ["a.json"]
        assert Report.model_validate_json((disk / "a.json").read_text()) == report()


def test_the_table_has_the_worst_family_first(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(table(report()))
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in console.export_text().splitlines()
        if "│" in line
    ]
    assert ["verdict echo", "+0.100", "+0.500", "4", "1"] in [row[-5:] for row in rows]
    assert [row[-5] for row in rows if row[-1] == "1"] == ["verdict echo", "flattery"]
    assert any("none: mean score 0.250" in row for row in rows)


# The limit ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("limit")
    for name, seed in (("policy", 0), ("judge", 1), ("other", 2)):
        make_model(root / name, num_hidden_layers=1, seed=seed)
    return root


def loaded(folder: Path, *words: str, limit: float | None = 0.2) -> LoadedConfig:
    prompt = {"en": {"user": "{response} Good?"}}
    read_out = {"type": "labels", "verdicts": {"good": 1.0, "bad": 0.0}}
    run = write_run(
        folder,
        folder / "policy",
        rewards={
            "verifiers": {"value": {"judge": "value"}, "lower": {"rule": "answer"}},
            "judges": {"value": {"server": "lm", "prompts": prompt, "read_out": read_out}},
            "recipe": {"value": {"value": 1.0}, "rule": {"lower": 1.0}},
            "attack_report": str(folder / "attack.json"),
            "attack_cases": str(folder / "cases.jsonl"),
            "max_attack_gain": limit,
        },
        servers={"lm": {"engine": "in_process", "model": str(folder / "judge")}},
    )
    return load_config([run], words)


def recipe(config: LoadedConfig, *labels: str) -> Recipe:
    return Recipe(
        config.config.rewards,
        Servers(config, unopened),
        labels or ("value",),
        config.origin,
    )


def check(config: LoadedConfig, *labels: str) -> None:
    refuse_untried(config, recipe(config, *labels))


def write(folder: Path, gain: float = 0.1, without: str = "") -> None:
    """A report on the judge as it is, and the cases that it was shown."""
    cases = "".join(case.model_dump_json() + "\n" for case in CASES[:2])
    (folder / "cases.jsonl").write_text(cases)
    config = loaded(folder)
    judge = recipe(config).verifiers["value"]
    section = config.config.rewards.judges["value"]
    shown = [base(case, section) for case in CASES[:2]]
    families = {
        name: {"mean_gain": 0.1, "largest_gain": 0.5, "cases": sum(len(family(each)) for each in shown), "missing": 0}
        for name, family in FAMILIES.items()
        if name not in ("fake_reference", without)
    }
    families["verdict_echo"]["mean_gain"] = gain
    known = {"digest": judge_digest(section), "model": judge.model.identity}  # type: ignore[attr-defined]
    found = report(families=families, **known)
    sha256 = hashlib.sha256(cases.encode()).hexdigest()
    write_report(found.model_copy(update={"cases_sha256": sha256}), folder / "attack.json")


def refused(config: LoadedConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_judge_within_the_limit_passes(folder: Path) -> None:
    write(folder, 0.2)
    check(loaded(folder))


def test_a_family_that_was_not_tried_is_refused(folder: Path) -> None:
    write(folder, without="padding")
    assert "judge 'value' was shown other attacks of the family 'padding'. Run safework attack" in refused(
        loaded(folder)
    )
    write(folder)
    check(loaded(folder))


def test_a_judge_over_the_limit_is_refused_by_its_worst_family(folder: Path) -> None:
    write(folder, 0.21)
    said = refused(loaded(folder))
    assert said.startswith(f"{LIMIT} = 0.2 ({folder}/run.yaml:1): attacks of the family 'verdict_echo' gain 0.210 on")
    assert "on judge 'value'" in said and str(folder / "attack.json") in said
    check(loaded(folder, f"{LIMIT}=0.3"))


def test_without_a_limit_or_a_judge_no_report_is_asked_for(folder: Path) -> None:
    (folder / "attack.json").unlink(missing_ok=True)
    check(loaded(folder, limit=None))
    check(loaded(folder), "rule")


def test_a_missing_report_is_refused(folder: Path) -> None:
    (folder / "attack.json").unlink(missing_ok=True)
    said = refused(loaded(folder))
    assert said.startswith(
        f"rewards.attack_report = '{folder}/attack.json' ({folder}/run.yaml:1): cannot be read (No such"
    )
    assert "Run safework attack" in said


def test_a_report_of_other_judges_is_refused(folder: Path) -> None:
    write(folder)
    table = json.loads((folder / "attack.json").read_text())
    table["judges"] = {"safety": table["judges"]["value"]}
    (folder / "attack.json").write_text(json.dumps(table))
    assert "does not hold judge 'value'" in refused(loaded(folder))


@pytest.mark.parametrize("text", ["", "[]", '{"judges": {}}'])
def test_a_file_that_is_no_report_is_refused(folder: Path, text: str) -> None:
    (folder / "attack.json").write_text(text)
    assert "is no report of safework attack" in refused(loaded(folder))


@pytest.mark.parametrize(
    "word",
    [
        "rewards.judges.value.prompts.en.user={response} Fine?",
        "rewards.judges.value.prompts.en.system=Judge.",
        "rewards.judges.value.read_out.verdicts.good=2.0",
        "rewards.judges.value.think_aware=on",
    ],
)
def test_a_judge_that_changed_is_refused(folder: Path, word: str) -> None:
    write(folder)
    assert "judge 'value' had another prompt or read-out when it was attacked" in refused(loaded(folder, word))


def test_a_report_of_other_or_fewer_cases_is_refused(folder: Path) -> None:
    write(folder)
    table = json.loads((folder / "attack.json").read_text())
    table["judges"]["value"]["base_cases"] = 1
    (folder / "attack.json").write_text(json.dumps(table))
    assert "judge 'value' was shown 1 of its 2 cases" in refused(loaded(folder))
    write(folder)
    (folder / "cases.jsonl").write_text(CASES[0].model_dump_json())
    assert f"is of other cases than those of {folder}/cases.jsonl" in refused(loaded(folder))


def test_a_report_of_other_labels_is_refused(folder: Path) -> None:
    write(folder)
    table = json.loads((folder / "attack.json").read_text())
    table["judges"]["value"]["labels"] = ["value", "more"]
    (folder / "attack.json").write_text(json.dumps(table))
    said = refused(loaded(folder))
    assert "judge 'value' was attacked with cases of value, more, and judges value. Run safework attack" in said


def test_another_model_is_refused(folder: Path) -> None:
    write(folder)
    said = refused(loaded(folder, f"servers.lm.model={folder}/other"))
    assert "judge 'value' asked another model" in said and f"is {folder}/other, weights" in said
    check(loaded(folder, "servers.lm.rows=2"))  # not what it is


# What the command refuses before it asks anything ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options", "problem"),
    [
        ([], Options(["nobody"], 0, ""), "--judge nobody: the recipe uses no such judge. Choose one of value."),
        ([], Options([], 0, "nowhere/a.json"), "--out nowhere/a.json: no such folder. Make it"),
        (
            ["rewards.attack_report=nowhere/a.json"],
            Options([], 0, ""),
            "rewards.attack_report = nowhere/a.json: no such",
        ),
        (
            ["rewards.recipe.mine={value: 1.0}", "rewards.attack_cases=README.md"],
            Options([], 0, ""),
            "README.md:1: not",
        ),
    ],
)
def test_what_cannot_be_attacked_is_refused(folder: Path, words: list[str], options: Options, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attack(loaded(folder, *words), unopened, options)
    assert problem in str(caught.value)


def test_a_recipe_without_judges_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^rewards.recipe \(.*rules.yaml:\d+\): uses no judge, so there is nothing to"
    ):
        attack(load_config([write_run(tmp_path, folder / "policy")]), unopened, Options([], 0, ""))


def test_a_judge_without_cases_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps({"id": "a", "labels": ["x"], "prompt": "q", "response": "r"}) + "\n")
    with pytest.raises(ConfigError, match=r"no case without a reference has a label of judge 'value' \(value\)\. Add"):
        attack(loaded(folder, f"rewards.attack_cases={file}"), unopened, Options([], 0, ""))
