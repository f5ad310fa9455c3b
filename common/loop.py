"""The training loop, readable as the algorithm: draw, roll out, score, credit, batch, update, record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from common.algorithms.by_label import group_advantages, informative_groups
from common.algorithms.schedule import learning_rate
from common.config.run import RunConfig
from common.data.batching import train_batches, with_old_logprobs
from common.experiment import Data
from common.journal import Journal
from common.metrics import Timer, rollout_metrics, rollout_records, update_metrics
from common.reporting import Reporter
from common.rewards.scorer import Results, Scored, ScoredGroup, Scorer, labels, score_arrays
from common.rollout.sampler import Draw, RolloutSampler, Stream
from common.run_dir import LoopState
from common.team_run import TeamRun
from common.trainer import NonFiniteUpdate, PolicyTrainer
from common.types import RolloutGroup, TrainBatch


@dataclass(frozen=True)
class Collected:
    """What one step rolled out and how it was scored, which groups teach, how many responses were sampled for it (those
    without a score too), and where the data cursor is now.
    """

    scored: Scored
    kept: np.ndarray
    num_sampled: int
    cursor: int


class Loop:
    """GRPO over one trainer. `run` goes from the newest checkpoint to `run.steps`.

    Every process of a team runs it, on the same prompts, and decides the same.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: PolicyTrainer,
        data: Data,
        sampler: RolloutSampler,
        scorer: Scorer,
        run: TeamRun,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._data = data
        self._sampler = sampler
        self._scorer = scorer
        self._run = run
        self._reporter = reporter

    def run(self) -> LoopState:
        """Train to the end or to an interrupt, from the newest checkpoint; returns the state that is saved last."""
        state = self._resume()
        if state.step == 0 and self._config.evaluation.at_ends:
            self._evaluate(state)
        stopping = self._run.stopping()
        while state.step < self._config.run.steps and not stopping:
            state = self._step(state)
            last = state.step == self._config.run.steps
            if self._is_due(self._config.evaluation.every, state.step) or (last and self._config.evaluation.at_ends):
                self._evaluate(state)
            # Read once, so that no signal can end the loop between the question and the save.
            stopping = self._run.stopping()
            if self._is_due(self._config.checkpoint.every, state.step) or last or stopping:
                self._run.save(state, self._trainer.snapshot)
        return state

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _resume(self) -> LoopState:
        state, checkpoint = self._run.resume()
        if state.step:
            self._trainer.restore(checkpoint)
        return replace(state, data=self._data.digests)

    def _step(self, state: LoopState) -> LoopState:
        timer = Timer()
        collected = self._collect(state, timer)
        with timer("update"):
            credit, batches = self._credit(collected)
            updates = self._update(state, [self._with_references(batch) for batch in batches])
        self._run.record("rollouts.jsonl", rollout_records(state.step, collected.scored.groups, credit, collected.kept))
        metrics = {
            "step": state.step,
            **rollout_metrics(collected.scored.groups, collected.kept, collected.scored.tallies),
            **update_metrics(updates, self._rates(state)),
            **timer.metrics(_response_tokens(collected.scored.groups)),
            "memory/peak_gib": self._trainer.peak_memory_gib(),
        }
        self._run.record("metrics.jsonl", [{**metrics, "engine": self._config.backend.name}])
        self._reporter.step(metrics, collected.scored.groups)
        if not updates:
            count = len(collected.scored.groups)
            self._reporter.say(f"step {state.step + 1}: no update, since none of its {count} groups was informative")
        return replace(
            state,
            step=state.step + 1,
            cursor=collected.cursor,
            policy_version=state.policy_version + len(updates),
        )

    def _collect(self, state: LoopState, timer: Timer) -> Collected:
        """Groups until enough of them teach or the refills are used up. The first draw is always whole."""
        config = self._config
        journal = self._run.journal(state, config.run.seed, self._scorer.sources)
        scored, kept = Scored(), np.zeros(0, bool)
        cursor, wanted = state.cursor, config.rollout.prompts_per_step
        for _ in range(1 + config.advantage.max_refills):
            draws = [Draw(index, self._data.train[index]) for index in range(cursor, cursor + wanted)]
            cursor += wanted
            with timer("rollout"):
                rolled = self._rolled(draws, state, journal)
            with timer("score"):
                scored = self._scorer.score(rolled, scored, self._asked(rolled, journal))
            kept = informative_groups(
                config.advantage, labels(scored.groups), *score_arrays(scored.groups, self._data.recipe)
            )
            wanted = config.rollout.prompts_per_step - int(kept.sum())
            if wanted == 0:
                break
        num_sampled = (cursor - state.cursor) * config.rollout.group_size
        return Collected(scored, kept, num_sampled, cursor)

    def _rolled(self, draws: Sequence[Draw], state: LoopState, journal: Journal) -> list[RolloutGroup]:
        """Groups for a step's draws: those that it had sampled before the run was killed, or new ones."""
        known = journal.rollouts(draws)
        if known is not None:
            return known
        groups = self._roll_out(draws, "train", state, self._config.rollout.group_size)
        journal.keep_rollouts(groups)
        return groups

    def _asked(self, groups: Sequence[RolloutGroup], journal: Journal) -> list[Results]:
        """What the verifiers say of a step's groups, or had said before the run was killed."""
        known = journal.results(groups)
        if known is not None:
            return known
        results = self._scorer.ask(groups)
        journal.keep_results(groups, results)
        return results

    def _roll_out(
        self, draws: Sequence[Draw], stream: Stream, state: LoopState, num_samples: int
    ) -> list[RolloutGroup]:
        """Sampled groups. Evaluation draws the same numbers whenever it runs, so that two of them compare."""
        step = state.step if stream == "train" else 0
        groups = self._sampler.groups(draws, stream, step, num_samples, state.policy_version)
        for group in groups:
            if not all(np.isfinite(rollout.logprobs).all() for rollout in group.rollouts):
                raise NonFiniteUpdate(
                    f"step {state.step}: the policy's logprobs of a response to prompt {group.prompt.id!r} are not "
                    "finite, so its weights cannot be. Mend the model in model.path, or start another run.dir with a "
                    "lower optimizer.learning_rate or backend.dtype=float32."
                )
        return groups

    def _credit(self, collected: Collected) -> tuple[np.ndarray, list[TrainBatch]]:
        """Advantages [P G] of all groups, 0 where a group does not teach, and the batches of those that do."""
        config, recipe = self._config, self._data.recipe
        totals, scores, present, weights = score_arrays(collected.scored.groups, recipe)
        credit, kept = np.zeros_like(totals), np.flatnonzero(collected.kept)
        if len(kept) == 0:
            return credit, []
        taught = [collected.scored.groups[index] for index in kept]
        arrays = (array[kept] for array in (totals, scores, present, weights))
        credit[kept] = group_advantages(config.advantage, labels(taught), *arrays)
        groups = [scored.group for scored in taught]
        limit = config.rollout.max_new_tokens
        batches = train_batches(groups, credit[kept], config.loss, config.batch, limit, collected.num_sampled)
        return credit, batches

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
                path = self._run.keep_batch(batch, state.step)
                raise NonFiniteUpdate(
                    f"step {state.step}: {error} The optimizer did not take this update; its batch is in {path}. "
                    "Look for outliers there, or start another run.dir with a lower optimizer.learning_rate or "
                    "backend.dtype=float32."
                ) from None
        return results

    def _evaluate(self, state: LoopState) -> None:
        """Score the held-out prompts with the policy as it is, or its average, and record the result."""
        config, started = self._config, time.perf_counter()
        draws = [Draw(index, prompt) for index, prompt in enumerate(self._data.heldout)]
        with self._trainer.averaged() if config.evaluation.weights == "ema" else nullcontext():
            groups = self._roll_out(draws, "heldout", state, config.evaluation.samples)
        scored = self._scorer.score(groups)
        every = np.ones(len(scored.groups), bool)
        metrics = {
            "step": state.step,
            **rollout_metrics(scored.groups, every, scored.tallies),
            "time/evaluation_s": time.perf_counter() - started,
        }
        self._run.record("evaluation.jsonl", [metrics])
        self._reporter.evaluation(metrics)


def _response_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts)
