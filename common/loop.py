"""The training loop, readable as the algorithm: draw, roll out, score, credit, batch, update, record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.algorithms.advantages import advantages, informative
from common.algorithms.schedule import learning_rate
from common.config.run import RunConfig
from common.data.batching import train_batches, with_old_logprobs
from common.experiment import Data
from common.interrupt import Interrupt
from common.metrics import Timer, rollout_metrics, rollout_records, update_metrics
from common.reporting import Reporter
from common.rewards.scorer import ScoredGroup, Scorer, score_arrays
from common.rollout.sampler import Draw, RolloutSampler
from common.run_dir import LoopState, RunDir
from common.trainer import NonFiniteUpdate, PolicyTrainer
from common.types import TrainBatch


@dataclass(frozen=True)
class Collected:
    """What one step rolled out: every scored group, which of them teach, and where the data cursor is now."""

    groups: tuple[ScoredGroup, ...]
    kept: np.ndarray
    missing: dict[str, int]
    cursor: int


class Loop:
    """GRPO over one trainer. `run` goes from the newest checkpoint to `run.steps`."""

    def __init__(
        self,
        config: RunConfig,
        trainer: PolicyTrainer,
        data: Data,
        sampler: RolloutSampler,
        run_dir: RunDir,
        reporter: Reporter,
        interrupt: Interrupt,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._data = data
        self._sampler = sampler
        self._scorer = Scorer(data.recipe, config.rewards.max_missing)
        self._run_dir = run_dir
        self._reporter = reporter
        self._interrupt = interrupt

    def run(self) -> LoopState:
        """Train to the end or to an interrupt, from the newest checkpoint; returns the state that was saved last."""
        state = self._resume()
        if state.step == 0 and self._config.evaluation.at_ends:
            self._evaluate(state)
        while state.step < self._config.run.steps and not self._interrupt.requested:
            state = self._step(state)
            last = state.step == self._config.run.steps
            if self._is_due(self._config.evaluation.every, state.step) or (last and self._config.evaluation.at_ends):
                self._evaluate(state)
            if self._is_due(self._config.checkpoint.every, state.step) or last or self._interrupt.requested:
                self._run_dir.save(state, self._trainer.save, self._config.checkpoint.keep)
        return state

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _resume(self) -> LoopState:
        state = self._run_dir.state()
        self._run_dir.rewind_records(state)
        if state.step:
            self._trainer.restore(self._run_dir.checkpoint(state.step))
        return state

    def _step(self, state: LoopState) -> LoopState:
        config, timer = self._config, Timer()
        collected = self._collect(state, timer)
        totals, scores, present, weights = score_arrays(collected.groups, self._data.recipe)
        kept = np.flatnonzero(collected.kept)
        credit = np.zeros_like(totals)
        updates: list[dict[str, float]] = []
        with timer("update"):
            if len(kept):
                credit[kept] = advantages(config.advantage, totals[kept], scores[kept], present[kept], weights[kept])
                groups = [collected.groups[index].group for index in kept]
                batches = train_batches(
                    groups, credit[kept], config.loss, config.batch, config.rollout.max_new_tokens, totals.size
                )
                updates = self._update(state, [self._with_references(batch) for batch in batches])
        self._run_dir.append("rollouts.jsonl", rollout_records(state.step, collected.groups, credit, collected.kept))
        metrics = {
            "step": state.step,
            **rollout_metrics(collected.groups, collected.kept, self._data.recipe, collected.missing),
            **update_metrics(updates, self._rates(state)),
            **timer.metrics(_response_tokens(collected.groups)),
            "memory/peak_gib": self._trainer.peak_memory_gib(),
        }
        self._run_dir.append("metrics.jsonl", [metrics])
        self._reporter.step(metrics, collected.groups)
        return replace(
            state,
            step=state.step + 1,
            cursor=collected.cursor,
            policy_version=state.policy_version + len(updates),
        )

    def _collect(self, state: LoopState, timer: Timer) -> Collected:
        """Groups until enough of them teach or the refills are used up. The first draw is always whole."""
        config = self._config
        groups: list[ScoredGroup] = []
        kept: list[bool] = []
        missing: dict[str, int] = {}
        cursor, wanted = state.cursor, config.rollout.prompts_per_step
        for _ in range(1 + config.advantage.max_refills):
            draws = [Draw(index, self._data.train[index]) for index in range(cursor, cursor + wanted)]
            cursor += wanted
            with timer("rollout"):
                rolled = self._sampler.groups(
                    draws, "train", state.step, config.rollout.group_size, state.policy_version
                )
            with timer("score"):
                scored = self._scorer.score(rolled)
            groups += scored.groups
            missing = {name: missing.get(name, 0) + count for name, count in scored.missing.items()}
            if scored.groups:
                totals, scores, present, _ = score_arrays(scored.groups, self._data.recipe)
                kept += informative(config.advantage, totals, scores, present).tolist()
            wanted = config.rollout.prompts_per_step - sum(kept)
            if wanted == 0:
                break
        return Collected(tuple(groups), np.array(kept, bool), missing, cursor)

    def _with_references(self, batch: TrainBatch) -> TrainBatch:
        """Old and reference logprobs, as far as the loss needs them, before any update of the step."""
        loss = self._config.loss
        if loss.old_logprobs == "recompute":
            batch = with_old_logprobs(batch, self._trainer.logprobs(batch, "policy"), loss.importance)
        elif loss.old_logprobs == "sampler":
            batch = replace(batch, old_logprobs=batch.sampling_logprobs)
        if loss.kl_coef > 0:
            batch = replace(batch, ref_logprobs=self._trainer.logprobs(batch, "reference"))
        return batch

    def _rates(self, state: LoopState) -> list[float]:
        per_step = self._config.loss.updates_per_rollout
        total = self._config.run.steps * per_step
        first = state.step * per_step
        return [learning_rate(self._config.optimizer, first + index, total) for index in range(per_step)]

    def _update(self, state: LoopState, batches: list[TrainBatch]) -> list[dict[str, float]]:
        results = []
        for batch, rate in zip(batches, self._rates(state), strict=False):
            try:
                results.append(self._trainer.update(batch, rate))
            except NonFiniteUpdate as error:
                path = self._run_dir.save_batch(batch, state.step)
                raise NonFiniteUpdate(
                    f"step {state.step}: {error} The optimizer was not run; the batch is in {path}. "
                    "Look for outliers there, lower optimizer.learning_rate, or use backend.dtype=float32."
                ) from None
        return results

    def _evaluate(self, state: LoopState) -> None:
        """Score the held-out prompts with the policy as it is and record the result."""
        config, started = self._config, time.perf_counter()
        draws = [Draw(index, prompt) for index, prompt in enumerate(self._data.heldout)]
        groups = self._sampler.groups(draws, "heldout", 0, config.evaluation.samples, state.policy_version)
        scored = self._scorer.score(groups)
        every = np.ones(len(scored.groups), bool)
        metrics = {
            "step": state.step,
            **rollout_metrics(scored.groups, every, self._data.recipe, scored.missing),
            "time/evaluation_s": time.perf_counter() - started,
        }
        self._run_dir.append("evaluation.jsonl", [metrics])
        self._reporter.evaluation(metrics)


def _response_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts)
