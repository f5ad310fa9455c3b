"""Targets by name, and the sentences for names that mean nothing."""

from __future__ import annotations

import pytest

from common.config import ConfigError
from common.plan.target import read_target


def test_targets_of_both_engines_are_read() -> None:
    pod, host = read_target("v5p:4x4x8", 2), read_target("h100:8", 1)
    assert (pod.chip.engine, pod.num_chips, pod.name, pod.chip.memory_gib) == ("jax", 256, "v5p:4x4x8", 95)
    assert (host.chip.engine, host.num_chips, host.name) == ("torch", 8, "h100:8")
    assert read_target("a100-80:64", 1).num_chips == 64
    assert read_target("h200:2", 1).chip.memory_gib == 140


@pytest.mark.parametrize(
    ("text", "slices", "words"),
    [
        ("v9:2x2", 1, "no machine is called 'v9'. Known: v5e, v5p, a100-80, h100, h200. Write "),
        ("v5p:4x4", 1, "v5p takes 3 sizes, as of its torus, after a colon. Write "),
        ("v5e:4x0", 1, "v5e takes 2 sizes"),
        ("v5e", 1, "v5e takes 2 sizes"),
        ("h100:2x4", 1, "h100 takes the number of chips after a colon"),
        ("h100:8", 2, "--slices 2: a TPU target has 1 or more, another target 1"),
    ],
)
def test_what_is_no_target_is_refused(text: str, slices: int, words: str) -> None:
    with pytest.raises(ConfigError) as found:
        read_target(text, slices)
    assert words in str(found.value)
