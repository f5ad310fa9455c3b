"""NumpyTrainer: a PolicyTrainer without an engine. The policy is a table of logits, a row for each class of previous
token; its gradients are real, by forward differentiation of the same `common.algorithms` that torch and JAX run.

As a program it takes the verbs of an engine: `python -m tests.numpy_trainer train CONFIG... [key=value...]`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import arrays
from common.algorithms.objective import Sums, TokenArrays, objective, update_record
from common.config import LoadedConfig, RunConfig
from common.config.method import LossConfig
from common.engine_main import Engine, run_verb
from common.serving.model import LocalJudge
from common.state_files import open_state
from common.trainer import NonFiniteUpdate, Response, Sampling, SamplingPrompt
from common.types import Kind, Piece, TrainBatch, TrainingState
from tests.adamw import Reference as AdamW
from tests.teams import open_team

TABLE = "table"
CLASSES = 8  # of previous tokens, by token id: few, so that a handful of responses teaches each


class Dual:
    """A value and its derivative by the logprob at the same place; as a sum, by the logprob at every place.

    Token losses depend on their own logprob alone, stopped ones aside, so that one slope an element is the gradient.
    """

    __array_ufunc__ = None  # numpy leaves `array * dual` to __rmul__

    def __init__(self, value: Any, slope: Any) -> None:
        self.value = value
        self.slope = slope

    def __add__(self, other: Any) -> Dual:
        return Dual(self.value + value_of(other), self.slope + slope_of(other))

    def __mul__(self, other: Any) -> Dual:
        slope = self.slope * value_of(other) + self.value * slope_of(other)
        return Dual(self.value * value_of(other), slope)

    def __pow__(self, power: int) -> Dual:
        return Dual(self.value**power, power * self.value ** (power - 1) * self.slope)

    def __neg__(self) -> Dual:
        return self * -1.0

    def __sub__(self, other: Any) -> Dual:
        return self + other * -1.0

    def __rsub__(self, other: Any) -> Dual:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __gt__(self, other: Any) -> np.ndarray:
        return self.value > value_of(other)

    def sum(self) -> Dual:
        """The sum over all places; its slope keeps one entry a place."""
        return Dual(self.value.sum(), self.slope)


def value_of(x: Any) -> Any:
    """The value of a dual or of a constant."""
    return x.value if isinstance(x, Dual) else x


def slope_of(x: Any) -> Any:
    """The slope of a dual; 0 of a constant."""
    return x.slope if isinstance(x, Dual) else 0.0


class DualNamespace:
    """numpy's names, as far as the mathematics uses them; where no dual goes in, none comes out."""

    cumsum = staticmethod(np.cumsum)

    @staticmethod
    def zeros_like(x: Any) -> np.ndarray:
        return np.zeros_like(value_of(x))

    @staticmethod
    def ones_like(x: Any) -> np.ndarray:
        return np.ones_like(value_of(x))

    @staticmethod
    def exp(x: Any) -> Any:
        return Dual(np.exp(x.value), np.exp(x.value) * x.slope) if isinstance(x, Dual) else np.exp(x)

    @staticmethod
    def expm1(x: Any) -> Any:
        return Dual(np.expm1(x.value), np.exp(x.value) * x.slope) if isinstance(x, Dual) else np.expm1(x)

    @staticmethod
    def where(condition: np.ndarray, x: Any, y: Any) -> Any:
        value = np.where(condition, value_of(x), value_of(y))
        if isinstance(x, Dual) or isinstance(y, Dual):
            return Dual(value, np.where(condition, slope_of(x), slope_of(y)))
        return value

    @classmethod
    def minimum(cls, x: Any, y: Any) -> Any:
        return cls.where(value_of(x) < value_of(y), x, y)

    @classmethod
    def maximum(cls, x: Any, y: Any) -> Any:
        return cls.where(value_of(x) > value_of(y), x, y)

    @classmethod
    def clip(cls, x: Any, low: float, high: float) -> Any:
        return cls.minimum(cls.maximum(x, low), high)


def _no_segment_sum(*_: Any) -> Any:
    raise AssertionError("sequence sums are of constants")


arrays.register(arrays.Engine(Dual, DualNamespace, value_of, _no_segment_sum))


def loss_and_slopes(
    loss: LossConfig, logprobs: np.ndarray, entropy: np.ndarray, constants: TokenArrays
) -> tuple[Dual, Sums]:
    """The objective with its gradient by each logprob [B T] as slope, and its statistics."""
    total, sums = objective(loss, Dual(logprobs, np.ones_like(logprobs)), entropy, constants)
    return total, Sums(*(float(value_of(value)) for value in sums))


class NumpyTrainer:
    """Logits of a token are the row of `table` [CLASSES V] that its previous token chooses; trained by AdamW.

    `calls` counts the passes that the loop asked for.
    """

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self._config = config
        table = np.random.default_rng(0).normal(0.0, 0.1, (CLASSES, vocab_size))
        self._reference = table.copy()
        self._optimizer = AdamW(config.optimizer, {TABLE: table}, frozenset({TABLE}))
        self._average = None if config.ema.decay is None else {TABLE: table.copy()}
        self.calls: Counter[str] = Counter()

    @property
    def table(self) -> np.ndarray:
        """The policy's logits, [CLASSES V]."""
        return self._optimizer.parameters[TABLE]

    def update(self, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
        """One optimizer step; see PolicyTrainer."""
        self.calls["update"] += 1
        with np.errstate(over="ignore", invalid="ignore"):
            loss, gradient, sums = self.gradient(self.table, batch)
            norm = float(np.sqrt((gradient**2).sum()))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NonFiniteUpdate(f"loss {loss}, gradient norm {norm}.")
        self._optimizer.step({TABLE: gradient}, learning_rate)
        if self._average is not None and self._optimizer.steps % self._config.ema.every == 0:
            self._average[TABLE] += (1.0 - self._config.ema.decay) * (self.table - self._average[TABLE])
        return update_record(sums, norm)

    def gradient(self, table: np.ndarray, batch: TrainBatch) -> tuple[float, np.ndarray, Sums]:
        """The loss of a batch under a table, its gradient [CLASSES V], and its statistics."""
        log_all = self._log_softmax(table)
        constants = TokenArrays(*(getattr(batch, name) for name in TokenArrays._fields))
        entropy = -(np.exp(log_all) * log_all).sum(axis=1)[_classes(batch)]
        total, sums = loss_and_slopes(self._config.loss, _logprobs(log_all, batch), entropy, constants)
        # From d loss / d logprob to d loss / d logits: one-hot minus probabilities.
        slopes = np.where(batch.positions > 0, total.slope, 0.0) / self._config.rollout.temperature
        gradient = np.zeros_like(table)
        np.add.at(gradient, (_classes(batch), batch.token_ids), slopes)
        of_class = np.bincount(_classes(batch).ravel(), slopes.ravel(), CLASSES)
        return float(total.value), gradient - of_class[:, None] * np.exp(log_all), sums

    def _log_softmax(self, table: np.ndarray) -> np.ndarray:
        """Log-probabilities at the sampling temperature, [CLASSES V]."""
        logits = table / self._config.rollout.temperature
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def logprobs(self, batch: TrainBatch, which: Literal["policy", "reference"]) -> np.ndarray:
        """float32 [B T]; see PolicyTrainer."""
        self.calls[which] += 1
        table = self.table if which == "policy" else self._reference
        return _logprobs(self._log_softmax(table), batch).astype(np.float32)

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        """Token by token by inverse CDF; top-k and top-p are not this trainer's business."""
        self.calls["sample"] += 1
        assert sampling.top_k == 0, "not implemented here"
        assert sampling.top_p == 1.0, "not implemented here"
        log_all = self._log_softmax(self.table)
        ends = np.exp(log_all).cumsum(axis=1)
        return [[_respond(prompt, row, log_all, ends, sampling) for row in prompt.uniforms] for prompt in prompts]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the policy's place; see PolicyTrainer."""
        policy, self._optimizer.parameters = self._optimizer.parameters, self._average
        yield
        self._optimizer.parameters = policy

    def snapshot(self) -> TrainingState:
        """Table and moments: of a run's processes, which all have them, each gives some rows. See PolicyTrainer."""
        rule, zeros = self._optimizer, np.zeros_like(self.table)
        arrays = {kind: tensors.get(TABLE, zeros) for kind, tensors in self._kinds().items()}
        index, count = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        start, stop = CLASSES * index // count, CLASSES * (index + 1) // count
        pieces = {kind: Piece(array[start:stop].copy(), (start, 0), array.shape) for kind, array in arrays.items()}
        return TrainingState({kind: {TABLE: [piece]} for kind, piece in pieces.items()}, rule.steps)

    def restore(self, directory: Path) -> None:
        """A saved table and its moments; see PolicyTrainer."""
        rule = self._optimizer
        with open_state(directory) as saved:
            for kind, tensors in self._kinds().items():
                tensors[TABLE] = saved.read(kind if kind in saved.kinds else "model", TABLE)
            rule.steps = saved.optimizer_steps

    def _kinds(self) -> dict[Kind, dict[str, np.ndarray]]:
        rule, average = self._optimizer, {"ema": self._average} if self._average is not None else {}
        return {"model": rule.parameters, "first_moment": rule.first, "second_moment": rule.second, **average}

    def peak_memory_gib(self) -> float:
        """Peak of resident memory."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _classes(batch: TrainBatch) -> np.ndarray:
    """The class of the token before each one, [B T]; means nothing where a segment starts."""
    return np.roll(batch.token_ids, 1, axis=1) % CLASSES


def _logprobs(log_all: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """[B T], 0 where a segment starts."""
    return np.where(batch.positions > 0, log_all[_classes(batch), batch.token_ids], 0.0)


def _respond(
    prompt: SamplingPrompt, uniforms: np.ndarray, log_all: np.ndarray, ends: np.ndarray, sampling: Sampling
) -> Response:
    previous, token_ids, logprobs = int(prompt.token_ids[-1]), [], []
    for uniform in uniforms:
        row = previous % CLASSES
        place = np.searchsorted(ends[row], uniform * ends[row, -1], side="right")
        previous = min(int(place), len(ends[row]) - 1)  # past the end where the logits are not finite
        token_ids.append(previous)
        logprobs.append(log_all[row, previous])
        if previous in sampling.stop_ids:
            break
    finish: Literal["stop", "length"] = "stop" if token_ids[-1] in sampling.stop_ids else "length"
    return Response(np.array(token_ids, np.int32), np.array(logprobs, np.float32), finish)


def open_trainer(loaded: LoadedConfig, policy: Path, reference: Path | None) -> NumpyTrainer:
    """A table as large as the vocabulary of the policy's folder; the reference is where it starts."""
    return NumpyTrainer(loaded.config, json.loads((policy / "config.json").read_text())["vocab_size"])


def open_judge(loaded: LoadedConfig, folder: Path) -> LocalJudge:
    """Judges in process need an engine of models; this one has a table."""
    raise AssertionError(f"{loaded.config.run.dir} asks for a judge in process, {folder}")


if __name__ == "__main__":
    sys.exit(run_verb(Engine(open_team, open_trainer, open_judge), sys.argv[1:]))
