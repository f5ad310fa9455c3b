"""How far verifiers agree with what is known: tables of verdicts and distances of numbers, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion(given: Sequence[str], judged: Sequence[str | None], verdicts: Sequence[str]) -> np.ndarray:
    """Counts int64 [C, C + 1]: rows are given verdicts, columns those of the judge, the last one for no verdict."""
    counts = np.zeros((len(verdicts), len(verdicts) + 1), np.int64)
    for expected, found in zip(given, judged, strict=True):
        counts[verdicts.index(expected), len(verdicts) if found is None else verdicts.index(found)] += 1
    return counts


def accuracy(counts: np.ndarray) -> float | None:
    """Share of given verdicts that the judge gave too; no verdict agrees with none. None where nothing was given."""
    return float(np.trace(counts) / counts.sum()) if counts.sum() else None


def macro_f1(counts: np.ndarray) -> float | None:
    """The mean F1 of the verdicts that were given or judged at least once; None where there are none."""
    given, judged = counts.sum(axis=1), counts[:, :-1].sum(axis=0)
    present = given + judged > 0
    if not present.any():
        return None
    return float(np.mean(2 * np.diagonal(counts)[present] / (given + judged)[present]))


def mean_distance(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Mean absolute difference of two lists of one length; None where they are empty."""
    return float(np.mean(_distances(first, second))) if len(first) else None


def largest_distance(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Largest absolute difference of two lists of one length; None where they are empty."""
    return float(np.max(_distances(first, second))) if len(first) else None


def _distances(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64))


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of two lists of one length; None where one of them does not vary."""
    if not len(first) or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
