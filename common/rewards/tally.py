"""What one verifier did in a step: how many scores, how many missing, how long its model took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.types import Asked, Missing, Score


@dataclass(frozen=True)
class Tally:
    """Counts of one verifier's results and how the asking went, if a model was asked."""

    scores: tuple[float, ...] = ()
    missing: int = 0
    unparsable: int = 0
    asked: tuple[Asked, ...] = ()
    disagreements: tuple[float, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.scores + other.scores,
            self.missing + other.missing,
            self.unparsable + other.unparsable,
            self.asked + other.asked,
            self.disagreements + other.disagreements,
        )

    def metrics(self, name: str) -> dict[str, float]:
        """Keys that end in the verifier's name. Latency and queue time, in seconds, are those of answers that were not
        cached; a key stands only where there is something to say.
        """
        found = {f"missing/{name}": float(self.missing)}
        if self.scores:
            found |= {f"reward/{name}": float(np.mean(self.scores)), f"spread/{name}": float(np.std(self.scores))}
        if self.disagreements:
            found[f"disagreement/{name}"] = float(np.mean(self.disagreements))
        if not self.asked:
            return found
        found |= {
            f"unparsable/{name}": float(self.unparsable),
            f"cache_hits/{name}": float(sum(asked.cached for asked in self.asked)),
        }
        if self.latency_s is not None:
            p50, p95 = self.latency_s
            queue_s = float(np.mean([asked.queue_s for asked in self.asked if not asked.cached]))
            found |= {f"latency_p50_s/{name}": p50, f"latency_p95_s/{name}": p95, f"queue_s/{name}": queue_s}
        return found

    @property
    def latency_s(self) -> tuple[float, float] | None:
        """Median and 95th percentile of the answers that were not cached; None where there are none."""
        new = [asked.latency_s for asked in self.asked if not asked.cached]
        if not new:
            return None
        p50, p95 = np.quantile(new, [0.5, 0.95])
        return float(p50), float(p95)


def tally(results: Sequence[Score | Missing]) -> Tally:
    """The tally of a verifier's results."""
    missing = [result for result in results if isinstance(result, Missing)]
    scores = [result for result in results if isinstance(result, Score)]
    return Tally(
        scores=tuple(score.value for score in scores),
        missing=len(missing),
        unparsable=sum(result.unparsable for result in missing),
        asked=tuple(result.asked for result in results if result.asked is not None),
        disagreements=tuple(score.disagreement for score in scores if score.disagreement is not None),
    )
