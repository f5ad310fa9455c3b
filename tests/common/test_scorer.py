"""Each response goes to its label's verifiers and to no other; a missing score drops its group, never is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ConfigError, load_config
from common.config.run import RewardsSection
from common.rewards.recipe import Recipe
from common.rewards.scorer import Scored, ScoreMissing, Scorer, score_arrays
from common.rewards.tally import Tally
from common.serving.in_process import unopened
from common.serving.servers import Servers
from common.team import alone
from common.types import Message, Missing, Prompt, Rollout, RolloutGroup, Sample, Score, Span
from tests.common.rewards.samples import rollout

RUN_FILE = """\
run: {dir: runs/test, steps: 1}
backend: {name: torch}
model: {path: some/model}
data: {train: [{path: a.jsonl}]}
rollout: {prompts_per_step: 4, group_size: 2, max_new_tokens: 16}
batch: {row_tokens: 2048, rows_per_microbatch: 1}
optimizer: {}
rewards:
  verifiers:
    answer: {rule: answer, options: {extract: boxed_or_bare}}
    words: {rule: instructions}
    length: {rule: overlong, options: {max_length: 10, buffer: 4}}
    unused: {rule: think_format}
    broken: {rule: nonsense}
    options: {rule: answer, options: {limt_s: 3}}
    short: {rule: overlong, options: {max_length: 3, buffer: 4}}
    bare: {rule: overlong}
  recipe:
    math: {answer: 0.9, length: 0.1}
    text: {words: 1.0, length: 0.5}
    plain: {answer: 2.0}
    broken: {broken: 1.0}
    options: {options: 1.0}
    short: {short: 1.0}
    bare: {bare: 1.0}
    gated: {answer: 2.0}
  gates:
    gated: [unused]
"""


def recipe(folder: Path, *labels: str) -> Recipe:
    path = folder / "run.yaml"
    path.write_text(RUN_FILE, encoding="utf-8")
    loaded = load_config([path])
    return Recipe(loaded.config.rewards, Servers(loaded, unopened), labels, loaded.origin)


def group(label: str, *texts: str, reference: Any = "4", draw: int = 0) -> RolloutGroup:
    rollouts = []
    for text in texts:
        length = len(text)
        ids, logprobs = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
        rollouts.append(
            Rollout(ids, np.ones(length, bool), logprobs, text, None, text, None, Span(0, length), "stop", 0)
        )
    prompt = Prompt(f"p{draw}", label, (Message("user", "?"),), reference)
    return RolloutGroup(prompt, draw, np.zeros(2, np.int32), tuple(rollouts))


def values(scored: Scored) -> list[list[dict[str, float]]]:
    return [
        [{name: score.value for name, score in reward.scores.items()} for reward in one.rewards]
        for one in scored.groups
    ]


def scorer(made: Recipe, max_missing: int = 0, **changes: Any) -> Scorer:
    return Scorer(made, RewardsSection(verifiers={}, recipe={}, max_missing=max_missing, **changes), alone())


def missing(scored: Scored) -> dict[str, int]:
    return {name: tally.missing for name, tally in scored.tallies.items()}


CONSTRAINTS = [["Length", "Words", "at most 2 words"]]


class Fails:
    """A verifier that cannot judge responses that say so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Sample] = []

    def score(self, samples: list[Sample]) -> list[Score | Missing]:
        self.seen += samples
        return [
            Missing(f"{self.name} is down") if self.name in sample.rollout.text else Score(0.5, "fine")
            for sample in samples
        ]


def failing(folder: Path, *names: str) -> tuple[Recipe, list[Fails]]:
    """The recipe of `math` and `text` with some verifiers taken by failing ones."""
    made = recipe(folder, "math", "text")
    fails = [Fails(name) for name in names]
    made.verifiers.update({verifier.name: verifier for verifier in fails})  # pyright: ignore
    return made, fails


# Routing --------------------------------------------------------------------------------------------------------------


def test_totals_are_the_weighted_sums_of_the_labels_own_verifiers(tmp_path: Path) -> None:
    groups = [
        group("math", "4", "5"),
        group("text", "two words", "but these are four", reference=CONSTRAINTS),
        group("plain", "4", "1234567890"),
    ]
    scored = scorer(recipe(tmp_path, "math", "text", "plain")).score(groups)
    assert [one.group for one in scored.groups] == groups
    assert values(scored) == [
        [{"answer": 1.0, "length": 0.0}, {"answer": 0.0, "length": 0.0}],
        [{"words": 1.0, "length": -0.75}, {"words": 0.0, "length": -1.0}],
        [{"answer": 1.0}, {"answer": 0.0}],
    ]
    totals = [[reward.total for reward in one.rewards] for one in scored.groups]
    assert totals == [[0.9, 0.0], [1.0 - 0.375, -0.5], [2.0, 0.0]]
    assert missing(scored) == {"answer": 0, "words": 0, "length": 0}
    assert scored.groups[0].rewards[0].scores["answer"].evidence == 'answer "4" equals reference "4"'


def test_a_verifier_sees_the_samples_of_its_labels_alone(tmp_path: Path) -> None:
    made, (answer, words) = failing(tmp_path, "answer", "words")
    groups = [group("math", "a", "b"), group("text", "c", "d"), group("math", "e", "f", draw=2)]
    scorer(made).score(groups)
    assert [sample.rollout.text for sample in answer.seen] == ["a", "b", "e", "f"]
    assert [sample.rollout.text for sample in words.seen] == ["c", "d"]
    assert answer.seen[2] == Sample(groups[2].prompt, groups[2].rollouts[0])


def test_only_verifiers_that_the_data_needs_are_built(tmp_path: Path) -> None:
    assert list(recipe(tmp_path, "math").verifiers) == ["answer", "length"]
    assert list(recipe(tmp_path, "plain", "text").verifiers) == ["answer", "words", "length"]
    assert recipe(tmp_path, "math", "math").terms == {"math": {"answer": 0.9, "length": 0.1}}


def test_nothing_to_score(tmp_path: Path) -> None:
    assert scorer(recipe(tmp_path, "math")).score([]) == Scored((), {"answer": Tally(), "length": Tally()})


# Missing scores -------------------------------------------------------------------------------------------------------


def test_missing_scores_are_counted_and_their_groups_dropped(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer", "words")
    groups = [
        group("math", "answer", "answer"),
        group("math", "fine", "fine", draw=1),
        group("text", "words", "fine", draw=2),
        group("text", "answer", "fine", draw=3),
    ]
    scored = scorer(made, 3).score(groups)
    assert [one.group.draw for one in scored.groups] == [1, 3]
    assert missing(scored) == {"answer": 2, "words": 1, "length": 0}
    assert all(isinstance(score, Score) for one in scored.groups for r in one.rewards for score in r.scores.values())


def message(made: Recipe, limit: int, *groups: RolloutGroup) -> str:
    with pytest.raises(ScoreMissing) as caught:
        scorer(made, limit).score(groups)
    return str(caught.value)


def test_over_the_limit_names_verifier_count_reason_and_limit(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer")
    other = group("text", "fine", reference=CONSTRAINTS, draw=2)
    groups = group("math", "answer", "answer", "answer"), group("math", "fine", draw=1), other
    assert message(made, 2, *groups) == (
        'verifier "answer": 3 of 4 scores missing, the first because answer is down. Limit is 2 a step '
        "(rewards.max_missing). Raise it, or set rewards.on_missing to drop, to go on without the groups concerned."
    )


def test_the_verifier_that_lost_most_is_blamed(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer", "words")
    groups = group("math", "answer", "fine"), group("text", "words", "words", draw=1)
    assert message(made, 0, *groups) == (
        'verifier "words": 2 of 2 scores missing (3 with other verifiers), the first because words is down. '
        "Limit is 0 a step (rewards.max_missing). Raise it, or set rewards.on_missing to drop, to go on without the "
        "groups concerned."
    )


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer")
    assert message(made, 9, group("math", "answer", "fine")) == (
        'verifier "answer": 1 of 2 scores missing, the first because answer is down. '
        "Every group lost one, so nothing is left to train on."
    )


def test_drop_goes_on_without_the_groups_as_long_as_one_is_left(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer")
    groups = [group("math", "answer", "answer"), group("math", "fine", "fine", draw=1)]
    scored = scorer(made, on_missing="drop").score(groups)
    assert [one.group.draw for one in scored.groups] == [1]
    assert missing(scored)["answer"] == 2
    with pytest.raises(ScoreMissing, match="nothing is left to train on"):
        scorer(made, on_missing="drop").score(groups[:1])


def test_gates_multiply_the_total(tmp_path: Path) -> None:
    made = recipe(tmp_path, "gated")
    assert list(made.verifiers) == ["answer", "unused"]
    right, wrong = "<think>so</think>4", "<think>so</think>5"
    prompt = group("gated", reference="4").prompt
    rollouts = tuple(rollout(text) for text in (right, wrong, "4"))
    (one,) = scorer(made).score([RolloutGroup(prompt, 0, np.zeros(2, np.int32), rollouts)]).groups
    assert [reward.total for reward in one.rewards] == [2.0, 0.0, 0.0]
    assert [reward.scores["unused"].value for reward in one.rewards] == [1.0, 1.0, 0.0]


def test_a_gate_below_zero_is_an_error_and_no_good_total(tmp_path: Path) -> None:
    made = recipe(tmp_path, "gated")
    scores = {"answer": Score(-1.0, ""), "unused": Score(-0.5, "")}
    with pytest.raises(ConfigError, match=r"'unused' gave -0\.5, and it is a gate of label 'gated'"):
        made.reward("gated", scores)
    assert made.reward("gated", scores | {"unused": Score(0.5, "")}).total == -1.0


def test_a_total_beyond_all_numbers_is_an_error(tmp_path: Path) -> None:
    made = recipe(tmp_path, "gated")
    with pytest.raises(
        ConfigError, match=r"^rewards\.recipe\.gated: a total of its scores is inf, beyond what a number"
    ):
        made.reward("gated", {"answer": Score(1e308, ""), "unused": Score(1e308, "")})


def test_refills_count_with_their_step(tmp_path: Path) -> None:
    made, _ = failing(tmp_path, "answer")
    scoring, lost = scorer(made, 2), group("math", "answer", "fine", draw=1)
    first = scoring.score([group("math", "fine", "fine")])
    second = scoring.score([lost], first)
    assert [one.group.draw for one in second.groups] == [0]
    assert missing(second)["answer"] == 1
    third = scoring.score([lost, group("math", "fine", "fine", draw=2)], second)
    assert [one.group.draw for one in third.groups] == [0, 2]
    with pytest.raises(ScoreMissing, match=r"Limit is 2 a step"):
        scoring.score([lost], third)


# Recipes that cannot be built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "start", "line", "end"),
    [
        ("other", "rewards.recipe", 18, "Labels with terms: bare, broken, gated, math, options, plain, short, text. "),
        ("broken", "rewards.verifiers.broken.rule = 'nonsense'", 14, "is no rule. Choose one of answer, instructions"),
        ("options", "rewards.verifiers.options.options.limt_s", 15, "Did you mean 'limit_s'?"),
        (
            "short",
            "rewards.verifiers.short.options = {'max_length': 3",
            16,
            "must be at least 1 and at most max_length",
        ),
        (
            "bare",
            "rewards.verifiers.bare.options.max_length",
            17,
            "is not set and has no default. Set it in a run file",
        ),
    ],
)
def test_recipe_that_cannot_be_built(label: str, start: str, line: int, end: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, "math", label)
    text = str(caught.value)
    assert text.startswith(start)
    assert f" ({tmp_path / 'run.yaml'}:{line}): " in text
    assert end in text
    assert "\n" not in text


def test_reference_that_a_verifier_cannot_use_names_prompt_and_verifier(tmp_path: Path) -> None:
    made = recipe(tmp_path, "math", "text")
    made.check(group("math", "").prompt)
    made.check(group("text", "", reference=CONSTRAINTS).prompt)
    with pytest.raises(ConfigError) as caught:
        made.check(group("math", "", reference=None, draw=8).prompt)
    assert str(caught.value).startswith("prompt 'p8' (label 'math'), verifier 'answer': The reference must be")


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_score_arrays(tmp_path: Path) -> None:
    made = recipe(tmp_path, "math", "text", "plain")
    groups = [
        group("math", "4", "5", "123456789"),
        group("text", "a", "b c", "d e f", reference=CONSTRAINTS),
        group("plain", "4", "5", "6"),
    ]
    scored = scorer(made).score(groups)
    totals, scores, present, weights = score_arrays(scored.groups, made)
    assert list(made.verifiers) == ["answer", "words", "length"]
    assert (totals.shape, scores.shape, present.shape, weights.shape) == ((3, 3), (3, 3, 3), (3, 3, 3), (3, 3))
    assert (totals.dtype, scores.dtype, present.dtype, weights.dtype) == (np.float64, np.float64, bool, np.float64)
    np.testing.assert_array_equal(weights, [[0.9, 0, 0.1], [0, 1.0, 0.5], [2.0, 0, 0]])
    mask = np.array([[True, False, True], [False, True, True], [True, False, False]])
    np.testing.assert_array_equal(present, np.repeat(mask[:, None], 3, axis=1))
    np.testing.assert_array_equal(np.isnan(scores), ~present)
    np.testing.assert_allclose(np.nansum(scores * weights[:, None], axis=-1), totals)
    np.testing.assert_allclose(totals[0], [0.9, 0, -0.075])
