"""What a summary says of given results, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.run import RewardsSection
from common.scoring.entries import Entry
from common.scoring.scores_file import Line, Name
from common.scoring.summary import NO_VERDICT, Change, Spread, summarise
from common.scoring.tables import tables
from common.types import Asked, Missing, Prompt, Sample, Score, Transcript
from tests.scoring import GOOD

REWARDS = RewardsSection.model_validate(
    {
        "verifiers": {"kind": {"judge": "kind"}, "short": {"rule": "think_format"}},
        "judges": {
            "kind": {
                "server": "s",
                "prompts": GOOD,
                "read_out": {"type": "verdict", "verdicts": {"yes": 1.0, "no": 0.0}},
            }
        },
        "recipe": {"b": {"kind": 1.0}, "a": {"kind": 1.0, "short": 1.0}},
    }
)


def asked(latency_s: float, cached: bool = False) -> Asked:
    return Asked("m", 0.0, latency_s, cached)


def rows(*rows: tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]) -> tuple[list[Entry], list[Line]]:
    """Entries and lines of (label, results, expected, recorded)."""
    entries, lines = [], []
    for label, results, expected, recorded in rows:
        sample = Sample(Prompt("p", label, ()), Transcript("", None, "", None))
        entries.append(Entry("p", sample, expected, recorded))
        lines.append(Line(Name("k", "p"), label, None, results))
    return entries, lines


YES, NO = Score(1.0, "", "yes", asked(1.0)), Score(0.0, "", "no", asked(3.0))
MUMBLED, DOWN = Missing("mumbled", True, asked(2.0)), Missing("down", asked=asked(9.0))
EMPTY, HALF = Score(0.0, "empty response"), Score(0.5, "")


def test_spreads_are_by_label_and_verifier() -> None:
    results = [YES, NO, MUMBLED, DOWN, Score(1.0, "", "yes", asked(0.0, cached=True))]
    summary = summarise(*rows(*(("b", {"kind": result}, {}, {}) for result in results)), REWARDS)
    assert (summary.records, summary.missing) == (5, 2)
    assert summary.spreads == (
        Spread("b", "kind", 3, pytest.approx(2 / 3), pytest.approx(2**0.5 / 3), 2, 1, 2.5, pytest.approx(8.1), 1),
    )
    assert summary.agreements == summary.changes == ()


def test_labels_and_verifiers_are_in_order_and_nothing_is_null() -> None:
    summary = summarise(*rows(("b", {"kind": DOWN}, {}, {}), ("a", {"kind": YES, "short": HALF}, {}, {})), REWARDS)
    assert [(each.label, each.verifier) for each in summary.spreads] == [("a", "kind"), ("a", "short"), ("b", "kind")]
    assert summary.spreads[1] == Spread("a", "short", 1, 0.5, 0.0, 0, 0, None, None, 0)
    assert summary.spreads[2] == Spread("b", "kind", 0, None, None, 1, 0, 9.0, 9.0, 0)


def test_agreement_counts_the_unparsable_and_leaves_out_what_was_not_answered() -> None:
    judged = [(YES, "yes"), (NO, "yes"), (MUMBLED, "no"), (NO, "no"), (DOWN, "no"), (EMPTY, "no"), (YES, None)]
    given = [("b", {"kind": result}, {} if verdict is None else {"kind": verdict}, {}) for result, verdict in judged]
    [agreement] = summarise(*rows(*given), REWARDS).agreements
    assert (agreement.verdicts, agreement.numbers) == (4, 0)
    assert agreement.accuracy == 0.5
    # yes: 2 x 1 / (2 + 1); no: 2 x 1 / (2 + 2)
    assert agreement.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert agreement.confusion == {"yes": {"yes": 1, "no": 1, NO_VERDICT: 0}, "no": {"yes": 0, "no": 1, NO_VERDICT: 1}}
    assert (agreement.mean_difference, agreement.correlation) == (None, None)


def test_agreement_of_numbers() -> None:
    judged = [(0.0, 0.0), (1.0, 0.5), (2.0, 0.5)]
    given = [("a", {"kind": YES, "short": Score(score, "")}, {"short": want}, {}) for want, score in judged]
    [agreement] = summarise(*rows(*given), REWARDS).agreements
    assert (agreement.verifier, agreement.verdicts, agreement.numbers) == ("short", 0, 3)
    assert agreement.mean_difference == pytest.approx(2 / 3)
    assert agreement.correlation == pytest.approx(3**0.5 / 2)
    assert (agreement.accuracy, agreement.macro_f1, agreement.confusion) == (None, None, {})


def test_changes_compare_present_scores() -> None:
    both = [(YES, YES), (NO, YES), (DOWN, YES), (Score(0.25, "", "no"), NO)]
    given = [("a", {"kind": now, "short": HALF}, {}, {"kind": old, "short": HALF}) for now, old in both]
    kind, short = summarise(*rows(*given), REWARDS).changes
    assert kind == Change("a", "kind", 3, pytest.approx(1.25 / 3), 1.0, pytest.approx(2 / 3))
    assert short == Change("a", "short", 4, 0.0, 0.0, None)


def test_everything_is_shown() -> None:
    summary = summarise(
        *rows(("b", {"kind": MUMBLED}, {"kind": "no"}, {}), ("b", {"kind": NO}, {}, {"kind": YES})), REWARDS
    )
    titles = [table.title for table in tables(summary)]
    assert titles == ["scores", "agreement with what the records expect", "b, kind", "changes since the run"]
