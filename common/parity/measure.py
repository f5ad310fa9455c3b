"""What one engine does for the ladder; every result goes to a folder, so that engines need not share an environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
from safetensors.numpy import load_file

from common.config import RunConfig
from common.config.method import LossConfig
from common.parity.recording import NOISE, batches, off_policy
from common.state_files import drop_moments, open_state, save_tensors, write_state
from common.trainer import PolicyTrainer, Sampling, SamplingPrompt
from common.types import TrainBatch, TrainingState

Curve = list[dict[str, float]]

OPTIMIZER_STEPS = 10
GREEDY_TOKENS = 16
LEARNING_RATE = 1e-5
# Other losses clip within the noise of `off_policy` by default; these caps would never be reached.
_WITHIN_NOISE = {"cispo": {"clip_high": NOISE}, "cpgd": {"drift_cap": NOISE, "drift_coef": 1.0}}


class ParityTrainer(PolicyTrainer, Protocol):
    """A trainer that also shows its gradients and takes foreign ones, both by Hugging Face name."""

    def named_gradients(self, batch: TrainBatch, loss: LossConfig) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradient of a whole batch under a given loss; nothing is stepped."""
        ...

    def loss_gradient(self, batch: TrainBatch, loss: LossConfig, logprobs: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective alone, no model: its value at given logprobs [B T] and its gradient with respect to them."""
        ...

    def apply_gradients(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """One optimizer step from these gradients, clip included. Raises NonFiniteUpdate, having changed nothing."""
        ...


def loss_cases(config: RunConfig, batch: TrainBatch) -> dict[str, tuple[LossConfig, TrainBatch]]:
    """A batch under every loss: each policy loss, on- and off-policy, and each KL penalty on the config's own loss."""
    types = get_args(LossConfig.model_fields["type"].annotation)
    penalties = get_args(LossConfig.model_fields["kl_type"].annotation)
    cases = {}
    for kind in types:
        loss = LossConfig.model_validate({"type": kind, **_WITHIN_NOISE.get(kind, {})})
        cases |= {f"{kind}/on": (loss, batch), f"{kind}/off": (loss, off_policy(batch))}
    for penalty in penalties:
        loss = LossConfig.model_validate({"type": config.loss.type, "kl_type": penalty, "kl_coef": 1.0})
        cases[f"{penalty}/off"] = (loss, off_policy(batch))
    return cases


def measure(config: RunConfig, trainer: ParityTrainer, recording: Path, gradients: Path, folder: Path) -> None:
    """Run every rung on the recorded batches.

    gradients: the safetensors file whose gradients the optimizer rung applies, the same for both engines; it may be
    the one of the on-policy gradients written here. Raises OSError when the disk does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recorded = batches(recording)
    on = recorded[0]
    _sampling(trainer, on, folder)
    logprobs = trainer.logprobs(on, "policy")
    np.save(folder / "logprobs.npy", logprobs)
    losses: dict[str, float] = {}
    for name, batch in (("on", on), ("off", off_policy(on))):
        losses[f"own/{name}"], found = trainer.named_gradients(batch, config.loss)
        save_tensors(found, folder / f"gradients-{name}.safetensors", {})
    slopes: dict[str, np.ndarray] = {}
    for name, (loss, batch) in loss_cases(config, on).items():
        losses[name], slopes[name] = trainer.loss_gradient(batch, loss, logprobs)
    save_tensors(slopes, folder / "loss-gradients.safetensors", {})
    (folder / "losses.json").write_text(json.dumps(losses, indent=1))
    _steps(trainer, recorded, config.loss, gradients, folder)


def _sampling(trainer: PolicyTrainer, batch: TrainBatch, folder: Path) -> None:
    """Greedy continuations of the recorded prompts."""
    distinct = {prompt.tobytes(): prompt for prompt in _recorded_prompts(batch)}
    prompts = list(distinct.values())[:4]
    uniforms = np.full((1, GREEDY_TOKENS), 0.5, np.float32)
    rule = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=GREEDY_TOKENS, stop_ids=(), rows=8)
    responses = trainer.sample([SamplingPrompt(prompt, uniforms) for prompt in prompts], rule)
    np.save(folder / "greedy.npy", np.stack([response.token_ids for [response] in responses]))


def _recorded_prompts(batch: TrainBatch) -> Iterator[np.ndarray]:
    """Where responses share a prompt, only the segment that holds it is its own prefix."""
    in_prompt = (batch.segment_ids == batch.prefix_ids) & ~batch.sampled
    for row, segments in enumerate(batch.segment_ids):
        for segment in np.unique(segments[in_prompt[row] & (segments > 0)]):
            yield batch.token_ids[row, (segments == segment) & in_prompt[row]]


def _steps(trainer: ParityTrainer, recorded: list[TrainBatch], loss: LossConfig, gradients: Path, folder: Path) -> None:
    """The rungs that move the weights, each from the same start. Moments that no rung reads leave the disk at once."""
    start = save(trainer, folder / "start")
    trainer.update(recorded[0], LEARNING_RATE)
    drop_moments(save(trainer, folder / "live-gradients"))
    trainer.restore(start)
    shared = load_file(gradients)
    for step in range(OPTIMIZER_STEPS):
        trainer.apply_gradients(_varied(shared, step), LEARNING_RATE)
    save(trainer, folder / "same-gradients")
    trainer.restore(start)
    drop_moments(start)
    (folder / "curve.json").write_text(json.dumps(_curve(trainer, recorded, loss, folder), indent=1))


def _curve(trainer: ParityTrainer, recorded: list[TrainBatch], loss: LossConfig, folder: Path) -> Curve:
    """The replayed steps, with the states at half of them and after them saved for the relay, which a single step has
    not. The last point is of the first batch again, which tells how far the updates moved it.
    """
    visited = [off_policy(batch) for batch in recorded]
    half = len(visited) // 2
    replayed: Curve = []
    for part, state in ((visited[:half], "half"), (visited[half:], "end")):
        replayed += replay(trainer, part, loss)
        if half:
            save(trainer, folder / state)
    return [*replayed, _point(trainer, visited[0], loss)]


def relay(config: RunConfig, trainer: ParityTrainer, recording: Path, other: Path, folder: Path) -> None:
    """Visit the second half of the recorded batches from the state in which the other engine began it.

    other, folder: measurements of the other engine and of this one, which gets the folder `relay`. Raises OSError when
    the disk does.
    """
    visited = [off_policy(batch) for batch in batches(recording)]
    trainer.restore(other / "half")
    taken_over = _differing(trainer.snapshot(), other / "half")
    replayed = replay(trainer, visited[len(visited) // 2 :], config.loss)
    state = save(trainer, folder / "relay")
    curve = [*replayed, _point(trainer, visited[0], config.loss)]
    (state / "relay.json").write_text(json.dumps({"differing": taken_over, "replayed": curve}, indent=1))


def replay(trainer: ParityTrainer, visited: list[TrainBatch], loss: LossConfig) -> Curve:
    """Loss and mean logprob of each batch before its update. Off-policy, because an on-policy loss is the same number
    for any weights.
    """
    curve = []
    for batch in visited:
        curve.append(_point(trainer, batch, loss))
        trainer.update(batch, LEARNING_RATE)
    return curve


def _point(trainer: ParityTrainer, batch: TrainBatch, loss: LossConfig) -> dict[str, float]:
    logprobs = trainer.logprobs(batch, "policy")
    mean = float(logprobs[batch.sampled].mean())
    return {"mean_logprob": mean, "loss": trainer.loss_gradient(batch, loss, logprobs)[0]}


def _differing(state: TrainingState, folder: Path) -> int:
    """How many numbers of a state that one process has whole are not those on the disk, bit for bit."""
    with open_state(folder) as saved:
        numbers = sum(
            int((piece.array.view(np.uint32) != saved.read(kind, name).view(np.uint32)).sum())
            for kind, tensors in state.tensors.items()
            for name, [piece] in tensors.items()
        )
        return numbers + (state.optimizer_steps != saved.optimizer_steps)


def save(trainer: ParityTrainer, folder: Path) -> Path:
    """Write the trainer's state into a folder of its own."""
    folder.mkdir(exist_ok=True)
    write_state(trainer.snapshot(), folder)
    return folder


def _varied(gradients: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """The shared gradients, each element scaled anew at each step: moments and bias correction have work to do."""
    rng = np.random.default_rng(step)
    return {
        name: gradients[name] * (rng.random(gradients[name].shape, dtype=np.float32) + np.float32(0.5))
        for name in sorted(gradients)
    }
