"""What came of scoring a file: counts and means, agreement with what records expect, changes since a run.

Each part is by label and verifier. Figures that do not exist, like the mean of no scores, are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from common.config.run import RewardsSection
from common.rewards.tally import tally
from common.scoring import agreement
from common.scoring.entries import Entry
from common.scoring.expected import Expected, verdicts_of
from common.scoring.scores_file import Line
from common.types import Missing, Score

NO_VERDICT = "(none)"


@dataclass(frozen=True)
class Spread:
    """The scores of one verifier for one label. cached: answers that were known before, of those that a model gave."""

    label: str
    verifier: str
    count: int
    mean: float | None
    std: float | None
    missing: int
    unparsable: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    cached: int


@dataclass(frozen=True)
class Agreement:
    """A verifier against what records expect of it.

    verdicts: how many records expect one and have one, or an unparsable answer, which agrees with none. confusion: the
    expected verdict, then the judge's, then how often. numbers: how many records expect a number and have a score.
    """

    label: str
    verifier: str
    verdicts: int
    accuracy: float | None
    macro_f1: float | None
    confusion: dict[str, dict[str, int]]
    numbers: int
    mean_difference: float | None
    correlation: float | None


@dataclass(frozen=True)
class Change:
    """A verifier's scores against those that the run recorded. equal_verdicts: a share, None where it gives none."""

    label: str
    verifier: str
    count: int
    mean_difference: float | None
    largest_difference: float | None
    equal_verdicts: float | None


@dataclass(frozen=True)
class Summary:
    """All of it. `missing` counts scores, not records."""

    records: int
    missing: int
    spreads: tuple[Spread, ...]
    agreements: tuple[Agreement, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return asdict(self)


class _Judged(NamedTuple):
    """What one verifier made of one record, what was expected, and what a run recorded."""

    result: Score | Missing
    expected: Expected | None
    recorded: Score | None


def summarise(entries: Sequence[Entry], lines: Sequence[Line], rewards: RewardsSection) -> Summary:
    """The summary of entries with their lines, in the same order."""
    table: dict[tuple[str, str], list[_Judged]] = {}
    for entry, line in zip(entries, lines, strict=True):
        for name in rewards.verifiers_of(line.label):
            judged = _Judged(line.results[name], entry.expected.get(name), entry.recorded.get(name))
            table.setdefault((line.label, name), []).append(judged)
    table = {place: table[place] for place in sorted(table)}
    return Summary(
        records=len(entries),
        missing=sum(len(line.missing) for line in lines),
        spreads=tuple(_spread(label, name, judged) for (label, name), judged in table.items()),
        agreements=tuple(_agreements(table, rewards)),
        changes=tuple(_changes(table)),
    )


def _spread(label: str, verifier: str, judged: Sequence[_Judged]) -> Spread:
    counts = tally([each.result for each in judged])
    p50, p95 = counts.latency_s or (None, None)
    return Spread(
        label=label,
        verifier=verifier,
        count=len(counts.scores),
        mean=float(np.mean(counts.scores)) if counts.scores else None,
        std=float(np.std(counts.scores)) if counts.scores else None,
        missing=counts.missing,
        unparsable=counts.unparsable,
        latency_p50_s=p50,
        latency_p95_s=p95,
        cached=sum(asked.cached for asked in counts.asked),
    )


def _agreements(table: Mapping[tuple[str, str], Sequence[_Judged]], rewards: RewardsSection) -> Iterator[Agreement]:
    for (label, verifier), judged in table.items():
        if any(each.expected is not None for each in judged):
            yield _agreement(label, verifier, judged, verdicts_of(rewards, verifier))


def _agreement(label: str, verifier: str, judged: Sequence[_Judged], verdicts: Sequence[str]) -> Agreement:
    given, found = [], []
    expected, scores = [], []
    for result, wanted, _ in judged:
        if isinstance(wanted, str) and _answered(result):
            given.append(wanted)
            found.append(result.verdict if isinstance(result, Score) else None)
        elif isinstance(wanted, int | float) and isinstance(result, Score):
            expected.append(wanted)
            scores.append(result.value)
    counts = agreement.confusion(given, found, verdicts)
    return Agreement(
        label=label,
        verifier=verifier,
        verdicts=len(given),
        accuracy=agreement.accuracy(counts),
        macro_f1=agreement.macro_f1(counts),
        confusion=_confusion(counts, verdicts),
        numbers=len(expected),
        mean_difference=agreement.mean_distance(expected, scores),
        correlation=agreement.correlation(expected, scores),
    )


def _answered(result: Score | Missing) -> bool:
    """Whether a judge answered, with a verdict or without; it is not asked about empty responses."""
    return result.verdict is not None if isinstance(result, Score) else result.unparsable


def _confusion(counts: np.ndarray, verdicts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows that were given, in the order of the judge's verdicts. counts: int64 [C, C + 1]."""
    columns = [*verdicts, NO_VERDICT]
    return {
        verdict: dict(zip(columns, map(int, row), strict=True))
        for verdict, row in zip(verdicts, counts, strict=True)
        if row.any()
    }


def _changes(table: Mapping[tuple[str, str], Sequence[_Judged]]) -> Iterator[Change]:
    for (label, verifier), judged in table.items():
        both = [
            (each.recorded, each.result)
            for each in judged
            if each.recorded is not None and isinstance(each.result, Score)
        ]
        if not both:
            continue
        before, now = [old.value for old, _ in both], [new.value for _, new in both]
        verdicts = [(old.verdict, new.verdict) for old, new in both if old.verdict or new.verdict]
        yield Change(
            label=label,
            verifier=verifier,
            count=len(both),
            mean_difference=agreement.mean_distance(before, now),
            largest_difference=agreement.largest_distance(before, now),
            equal_verdicts=float(np.mean([old == new for old, new in verdicts])) if verdicts else None,
        )
