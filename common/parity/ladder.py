"""The ladder: figures of one engine held against the other's, each with its limit, as a table and a certificate."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors import safe_open

from common.algorithms.losses import policy_loss
from common.config import RunConfig
from common.data.frozen import frozen_names
from common.parity.measure import loss_cases
from common.parity.recording import batches, off_policy
from common.types import TrainBatch

LOGPROB = 1e-4
LOSS_SHARE = 5e-6
LOSS_SLOPE = 1e-4
COSINE_GAP = 1e-5
NORM_RATIO = 1e-4
GRADIENT_L2 = 1e-3
SAME_GRADIENTS = 1e-4
LIVE_GRADIENTS = 0.1
RELAY_MOMENTS = 1e-3
CURVE = 1e-3
CURVE_SHARE = 0.1  # of how far the updates moved the curve: engines that stand still agree too
MOMENTS = ("first_moment", "second_moment")
PACKAGES = ("numpy", "torch", "jax", "flax", "optax", "transformers", "safework")


@dataclass(frozen=True)
class Rung:
    """One comparison: the worst figure found, its limit, and where it was."""

    name: str
    figure: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.figure <= self.limit


def compare(config: RunConfig, recording: Path, first: Path, second: Path) -> list[Rung]:
    """All rungs between two engines' measurements of one recording."""
    recorded = batches(recording)[0]
    return [
        _greedy(first, second),
        _logprobs(recorded, first, second),
        *_losses(config, recorded, first, second),
        *_gradients(first, second),
        *_states(config.model.frozen, first, second),
        *_curves(first, second),
    ]


def compare_relays(config: RunConfig, first: Path, second: Path) -> list[Rung]:
    """The rungs of each engine going on where the other was after half of the replayed steps, held against all of them
    on either.
    """
    frozen = config.model.frozen
    return [*_relay(frozen, second, first), *_relay(frozen, first, second)]


def _greedy(first: Path, second: Path) -> Rung:
    left, right = (np.load(folder / "greedy.npy") for folder in (first, second))
    return Rung("greedy tokens that differ", float((left != right).sum()), 0.0, f"of {left.size}")


def _logprobs(batch: TrainBatch, first: Path, second: Path) -> Rung:
    left, right = (np.load(folder / "logprobs.npy") for folder in (first, second))
    gap = np.abs(left - right)
    row, place = np.unravel_index(gap.argmax(), gap.shape)
    return Rung(
        "logprob difference", float(gap.max()), LOGPROB, f"row {row}, token {place} of {int(batch.sampled.sum())}"
    )


def _losses(config: RunConfig, batch: TrainBatch, first: Path, second: Path) -> Iterator[Rung]:
    """Loss differences relative to the sum of |weight x token loss|: an on-policy loss itself is about zero."""
    left, right = (json.loads((folder / "losses.json").read_text()) for folder in (first, second))
    logprobs = np.load(first / "logprobs.npy")
    cases = {"own/on": (config.loss, batch), "own/off": (config.loss, off_policy(batch)), **loss_cases(config, batch)}
    for name, (loss, own) in cases.items():
        old = logprobs if own.old_logprobs is None else own.old_logprobs
        tokens = policy_loss(loss, logprobs, old, batch.advantages, batch.sampled, batch.segment_ids)
        scale = float(np.abs(batch.policy_weights * tokens).sum())
        yield Rung(f"loss {name}", abs(left[name] - right[name]) / scale, LOSS_SHARE, f"{left[name]:.6g}")
    file = "loss-gradients.safetensors"
    for name, a, b in _tensor_pairs(first / file, second / file):
        yield Rung(f"gradient in logprobs, {name}", _relative_l2(a, b), LOSS_SLOPE, f"norm {np.linalg.norm(a):.6g}")


def _gradients(first: Path, second: Path) -> Iterator[Rung]:
    for policy in ("on", "off"):
        name = f"gradients-{policy}.safetensors"
        figures = list(_tensor_pairs(first / name, second / name))
        for title, limit, figure in (
            ("1 - cosine", COSINE_GAP, _cosine_gap),
            ("norm ratio - 1", NORM_RATIO, _norm_gap),
            ("relative L2", GRADIENT_L2, _relative_l2),
        ):
            worst = _worst([(figure(a, b), tensor) for tensor, a, b in figures])
            yield Rung(f"gradient {title}, {policy}-policy", *_with_limit(worst, limit))


def _with_limit(worst: tuple[float, str], limit: float) -> tuple[float, float, str]:
    return worst[0], limit, worst[1]


def _nan_first(value: float) -> float:
    return np.inf if np.isnan(value) else value


def _states(frozen: Sequence[str], first: Path, second: Path) -> Iterator[Rung]:
    """Updates and moments after steps from the same gradients, and the update after one step from live ones."""
    for title, folder, limit in (
        ("update, same gradients", "same-gradients", SAME_GRADIENTS),
        ("update, live gradients", "live-gradients", LIVE_GRADIENTS),
    ):
        yield Rung(title, *_with_limit(_worst_update(frozen, first, first / folder, second / folder), limit))
    for moment in MOMENTS:
        worst = _worst_moment(moment, first / "same-gradients", second / "same-gradients")
        yield Rung(f"{_title(moment)}, same gradients", *_with_limit(worst, SAME_GRADIENTS))


def _relay(frozen: Sequence[str], giver: Path, taker: Path) -> Iterator[Rung]:
    """One engine's steps from where the other was after half of them."""
    title, relay, ends = f"{giver.name} then {taker.name}", taker / "relay", (giver / "end", taker / "end")
    said = json.loads((relay / "relay.json").read_text())
    yield Rung(f"{title}, state taken over", float(said["differing"]), 0.0, "numbers that differ")
    worst = _worst([_worst_update(frozen, taker, end, relay) for end in ends])
    yield Rung(f"{title}, update", *_with_limit(worst, LIVE_GRADIENTS))
    for moment in MOMENTS:
        worst = _worst([_worst_moment(moment, end, relay) for end in ends])
        yield Rung(f"{title}, {_title(moment)}", *_with_limit(worst, RELAY_MOMENTS))
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (giver, taker)]
    for key in ("loss", "mean_logprob"):
        straight = [_series(curve, key) for curve in curves]
        relayed = _series(said["replayed"], key)
        yield _curve_rung(f"{title}, {_title(key)}", straight[1][0], relayed, straight)


def _worst_update(frozen: Sequence[str], origin: Path, first: Path, second: Path) -> tuple[float, str]:
    """The largest relative difference of what was added to a tensor of the start, and the tensor; infinite for one that
    a pattern freezes and that moved.
    """
    worst = (0.0, "")
    with safe_open(origin / "start" / "model.safetensors", "np") as start:
        for name, left, right in _tensor_pairs(first / "model.safetensors", second / "model.safetensors"):
            before = start.get_tensor(name).astype(np.float64)
            difference = _any_motion if frozen_names([name], frozen) else _relative_l2
            worst = _worst([worst, (difference(left - before, right - before), name)])
    return worst


def _worst_moment(moment: str, first: Path, second: Path) -> tuple[float, str]:
    file = f"{moment}.safetensors"
    return _worst([(_relative_l2(a, b), name) for name, a, b in _tensor_pairs(first / file, second / file)])


def _worst(figures: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return max(figures, key=lambda figure: _nan_first(figure[0]))


def _title(key: str) -> str:
    return key.replace("_", " ")


def _tensor_pairs(first: Path, second: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    with safe_open(first, "np") as left, safe_open(second, "np") as right:
        names = sorted(left.keys())
        if names != sorted(right.keys()):
            raise ValueError(f"{first} and {second} hold different tensors: {set(names) ^ set(right.keys())}")
        for name in names:
            yield name, left.get_tensor(name).astype(np.float64), right.get_tensor(name).astype(np.float64)


def _cosine_gap(left: np.ndarray, right: np.ndarray) -> float:
    return float(1.0 - (left * right).sum() / (np.linalg.norm(left) * np.linalg.norm(right)))


def _norm_gap(left: np.ndarray, right: np.ndarray) -> float:
    return float(abs(np.linalg.norm(left) / np.linalg.norm(right) - 1.0))


def _relative_l2(left: np.ndarray, right: np.ndarray) -> float:
    """Infinite for a tensor without any values but 0: two engines that do nothing agree, and prove nothing."""
    norm = np.linalg.norm(left)
    return float(np.linalg.norm(left - right) / norm) if norm else np.inf


def _any_motion(left: np.ndarray, right: np.ndarray) -> float:
    return np.inf if left.any() or right.any() else 0.0


def _curves(first: Path, second: Path) -> Iterator[Rung]:
    left, right = (json.loads((folder / "curve.json").read_text()) for folder in (first, second))
    for key in ("loss", "mean_logprob"):
        ours, theirs = _series(left, key), _series(right, key)
        yield _curve_rung(f"{_title(key)} over {len(ours) - 1} replayed steps", ours[0], ours, [theirs])


def _series(points: Sequence[dict[str, float]], key: str) -> np.ndarray:
    return np.array([point[key] for point in points])


def _curve_rung(title: str, start: float, ours: np.ndarray, others: Sequence[np.ndarray]) -> Rung:
    """A curve against the ends of others; `start`: what its last point was before the first update. Infinite where that
    has not moved.
    """
    gaps = np.abs(np.stack([other[-len(ours) :] for other in others]) - ours).max(axis=0)
    moved = float(np.abs(ours[-1] - start))
    where = f"step {np.argmax(gaps)}, moved by {moved:.3g}"
    return Rung(title, float(np.max(gaps)) if moved else np.inf, min(CURVE, CURVE_SHARE * moved), where)


def table(rungs: Sequence[Rung]) -> Table:
    """The ladder for a person."""
    shown = Table("rung", "figure", "limit", "", "where", title="torch against JAX, fp32")
    for rung in rungs:
        mark = "pass" if rung.passed else "[bold red]FAIL[/]"
        shown.add_row(rung.name, f"{rung.figure:.3g}", f"{rung.limit:.3g}", mark, rung.where)
    return shown


def certificate(config: RunConfig, recording: Path, rungs: Sequence[Rung]) -> dict[str, Any]:
    """What was compared, with which versions, and how it came out; JSON-ready."""
    digest = hashlib.sha256()
    for path in sorted(recording.glob("batch-*.npz")):
        digest.update(path.read_bytes())
    return {
        "passed": all(rung.passed for rung in rungs),
        "model": config.model.path,
        "recording_sha256": digest.hexdigest(),
        "batches": len(list(recording.glob("batch-*.npz"))),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "rungs": [asdict(rung) | {"passed": rung.passed} for rung in rungs],
        "config": config.model_dump(),
    }
