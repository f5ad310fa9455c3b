"""What a record says that verifiers should find, checked against what they can find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.config.run import RewardsSection
from common.data.records import BadRecord

Expected = str | float  # a verdict or a score
_LARGEST = 1e100  # whose squares can be summed up


def expected_values(record: Mapping[str, Any], label: str, rewards: RewardsSection) -> dict[str, Expected]:
    """`expected` and `verdict` of a record with this label, by verifier. Raises BadRecord for what nothing can meet."""
    asked = rewards.verifiers_of(label)
    expected = dict(_table(record.get("expected")))
    if record.get("verdict") is not None:
        judges = [name for name in asked if rewards.verifiers[name].judge is not None]
        if len(judges) != 1:
            raise BadRecord(
                f"'verdict' is for a label with one judge, and {label!r} has {', '.join(judges) or 'none'}. "
                'Write "expected": {verifier: verdict}.'
            )
        expected.setdefault(judges[0], record["verdict"])
    for name, value in expected.items():
        if name not in asked:
            raise BadRecord(
                f"expects something of {name!r}, which the label {label!r} does not ask. "
                f"It asks {', '.join(asked) or 'nobody'}."
            )
        _check(name, value, verdicts_of(rewards, name))
    return expected


def verdicts_of(rewards: RewardsSection, verifier: str) -> list[str]:
    """The verdicts that a verifier chooses among, in order; none where it gives a number alone."""
    judge = rewards.verifiers[verifier].judge
    if judge is None:
        return []
    read_out = rewards.judges[judge].read_out
    if read_out.type == "number":
        return [f"{grade:g}" for grade in sorted(read_out.grades)]
    return [] if read_out.type == "scalar" else list(read_out.verdicts)


def _table(expected: Any) -> Mapping[str, Any]:
    if expected is None:
        return {}
    if not isinstance(expected, dict):
        raise BadRecord("'expected' must be an object of verifier: verdict or number.")
    return expected


def _check(name: str, value: Any, verdicts: Sequence[str]) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord(f"expects {value!r} of {name!r}, which is neither a verdict nor a number.")
    if not isinstance(value, str) and not abs(value) <= _LARGEST:
        raise BadRecord(f"expects a number of {name!r} that is beyond {_LARGEST:g}, or none. Correct it.")
    if isinstance(value, str) and value not in verdicts:
        known = f"choose one of {', '.join(map(repr, verdicts))}" if verdicts else "it gives numbers alone"
        raise BadRecord(f"expects the verdict {value!r} of {name!r}: {known}.")
