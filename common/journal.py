"""What a step has sampled and scored so far, kept beside its checkpoint, so that a killed run need not do it again.

The journal is of the step after the newest checkpoint: only there does a resumed run have the weights that sampled
it. A line holds the rollouts of a draw of groups, or the verifiers' results for them; arrays are base64 of their bytes,
so that they come back bit for bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from common.rewards.scorer import Results
from common.rollout.sampler import Draw
from common.types import Asked, Missing, Rollout, RolloutGroup, Score, Span

_ROLLOUTS, _RESULTS = "rollouts", "results"
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)
_ARRAYS = {"token_ids": np.int32, "sampled": np.bool_, "logprobs": np.float32}


class Journal:
    """The lines of one step, found by the places of their groups in the data order. What cannot be read is not known.

    sampled, scored: what a line of rollouts and one of results must be of: the save whose weights sampled it, the seed,
    the rewards. append: how a line is added to the file; None where a resumed run would not find these weights.
    """

    def __init__(
        self,
        text: str,
        sampled: Mapping[str, Any],
        scored: Mapping[str, Any],
        append: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._keys, self._append = {_ROLLOUTS: dict(sampled), _RESULTS: dict(scored)}, append
        self._found: dict[tuple[str, tuple[int, ...]], Any] = {}
        for line in text.split("\n"):
            with suppress(*_UNREADABLE):  # a killed process, or a machine without power, may have left half a line
                record = json.loads(line)
                if record["key"] == self._keys[record["kind"]]:
                    self._found[record["kind"], tuple(record["draws"])] = record["content"]

    def __len__(self) -> int:
        return len(self._found)

    def rollouts(self, draws: Sequence[Draw]) -> list[RolloutGroup] | None:
        """The groups that were sampled for these draws; None where they are not known."""
        with suppress(*_UNREADABLE):
            found = self._found[_ROLLOUTS, tuple(draw.place for draw in draws)]
            return [_group(*pair) for pair in zip(draws, found, strict=True)]
        return None

    def results(self, groups: Sequence[RolloutGroup]) -> list[Results] | None:
        """The verifiers' results for these groups; None where they are not known."""
        with suppress(*_UNREADABLE):
            found = self._found[_RESULTS, tuple(group.draw for group in groups)]
            return [_results(*pair) for pair in zip(groups, found, strict=True)]
        return None

    def keep_rollouts(self, groups: Sequence[RolloutGroup]) -> None:
        """Add what a draw has sampled. Raises NotSaved."""
        if self._append is not None:
            self._add(_ROLLOUTS, groups, [_group_record(group) for group in groups])

    def keep_results(self, groups: Sequence[RolloutGroup], results: Sequence[Results]) -> None:
        """Add what the verifiers say of a draw, unless some of it is missing: that is asked again. Raises NotSaved."""
        samples = [sample for group in results for sample in group]
        if self._append is None or any(isinstance(each, Missing) for sample in samples for each in sample.values()):
            return
        found = [[{name: vars(each) for name, each in sample.items()} for sample in group] for group in results]
        self._add(_RESULTS, groups, found)

    def _add(self, kind: str, groups: Sequence[RolloutGroup], content: Any) -> None:
        assert self._append is not None
        draws = [group.draw for group in groups]
        self._append({"key": self._keys[kind], "kind": kind, "draws": draws, "content": content})


def _group_record(group: RolloutGroup) -> dict[str, Any]:
    def record(rollout: Rollout) -> dict[str, Any]:
        return {**vars(rollout), **{name: _text(vars(rollout)[name]) for name in _ARRAYS}}

    rollouts = [record(rollout) for rollout in group.rollouts]
    return {"prompt_token_ids": _text(group.prompt_token_ids), "rollouts": rollouts}


def _group(draw: Draw, found: Mapping[str, Any]) -> RolloutGroup:
    def rollout(record: Mapping[str, Any]) -> Rollout:
        arrays = {name: _array(record[name], dtype) for name, dtype in _ARRAYS.items()}
        spans = {"reasoning": record["reasoning"] and Span(*record["reasoning"]), "answer": Span(*record["answer"])}
        return Rollout(**{**record, **arrays, **spans})

    rollouts = tuple(rollout(record) for record in found["rollouts"])
    return RolloutGroup(draw.prompt, draw.place, _array(found["prompt_token_ids"], np.int32), rollouts)


def _results(group: RolloutGroup, found: Sequence[Mapping[str, Any]]) -> Results:
    pairs = zip(group.rollouts, found, strict=True)
    return [{name: _score(score) for name, score in sample.items()} for _, sample in pairs]


def _score(found: Mapping[str, Any]) -> Score:
    return Score(**{**found, "asked": found["asked"] and Asked(*found["asked"])})


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
