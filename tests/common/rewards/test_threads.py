"""Verifiers side by side: what one of them does holds up no other and is never another's result."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from common.rewards.tally import Tally, tally
from common.rewards.threads import Verifying
from common.rewards.verifier import Verifier
from common.types import Asked, Missing, Sample, Score
from tests.common.rewards.samples import sample


class Waits(Verifier):
    """Scores once another part of the test lets it."""

    def __init__(self, name: str, go: threading.Event) -> None:
        self.name, self.go = name, go

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        self.go.wait(30)
        return [Score(float(len(each.rollout.text)), self.name) for each in samples]


class LetsGo(Verifier):
    def __init__(self, go: threading.Event) -> None:
        self.name, self.go = "lets go", go

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        self.go.set()
        return [Score(1.0, self.name) for _ in samples]


class Raises(Verifier):
    name = "raises"

    def score(self, samples: Sequence[Sample]) -> list[Score | Missing]:
        raise ZeroDivisionError("of the verifier's own")


SAMPLES = [sample("a"), sample("bcd")]


def test_they_run_at_the_same_time() -> None:
    go = threading.Event()
    verifying = Verifying({"first": Waits("first", go), "second": LetsGo(go)}, 30)
    found = verifying.results({"first": SAMPLES, "second": SAMPLES[:1]})
    assert found == {"first": [Score(1.0, "first"), Score(3.0, "first")], "second": [Score(1.0, "lets go")]}


def test_one_that_never_returns_is_missing_and_not_asked_again() -> None:
    go = threading.Event()
    verifying = Verifying({"stuck": Waits("stuck", go), "well": LetsGo(threading.Event())}, 0.2)
    started = time.monotonic()
    found = verifying.results({"stuck": SAMPLES, "well": SAMPLES})
    assert time.monotonic() - started < 5
    assert found["well"] == [Score(1.0, "lets go")] * 2
    assert found["stuck"] == [Missing("it gave no result within 0.2 s (rewards.deadline_s)")] * 2
    assert verifying.results({"stuck": SAMPLES[:1]})["stuck"] == [
        Missing("it still works on samples of an earlier step")
    ]
    go.set()
    time.sleep(0.1)
    assert verifying.results({"stuck": SAMPLES[:1]})["stuck"] == [Score(1.0, "stuck")]


def test_what_a_verifier_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError, match="of the verifier's own"):
        Verifying({"raises": Raises()}, 30).results({"raises": SAMPLES})


def test_no_samples_are_not_asked_about() -> None:
    assert Verifying({"raises": Raises()}, 30).results({"raises": []}) == {"raises": []}


def asked(latency_s: float, cached: bool = False) -> Asked:
    return Asked("model", 0.5, latency_s, cached)


def test_a_tally_counts_and_adds() -> None:
    first = tally(
        [Score(0.0, "", asked=asked(1.0)), Score(1.0, "", asked=asked(3.0)), Missing("late", asked=asked(9.0))]
    )
    second = tally([Score(0.5, "", asked=asked(0.0, cached=True)), Missing("?", unparsable=True, asked=asked(2.0))])
    found = (first + second).metrics("safety")
    assert found == {
        "missing/safety": 2.0,
        "reward/safety": 0.5,
        "spread/safety": pytest.approx(0.408248),
        "unparsable/safety": 1.0,
        "cache_hits/safety": 1.0,
        "latency_p50_s/safety": 2.5,
        "latency_p95_s/safety": pytest.approx(8.1),
        "queue_s/safety": 0.5,
    }


def test_a_tally_of_nothing_says_nothing() -> None:
    assert Tally().metrics("rule") == {"missing/rule": 0.0}
    assert tally([Score(1.0, "")]).metrics("rule") == {"missing/rule": 0.0, "reward/rule": 1.0, "spread/rule": 0.0}
