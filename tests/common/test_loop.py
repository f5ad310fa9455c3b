"""The training loop on a numpy policy with real gradients: it learns, teaches from informative groups alone, asks the
trainer for what the loss needs and for no more, and writes down what it did.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.algorithms.schedule import learning_rate
from common.config import load_config
from common.metrics import UPDATE_KEYS, update_metrics
from tests.numpy_run import train
from tests.numpy_trainer import NumpyTrainer
from tests.runs import IMPOSSIBLE, LOWERCASE, lowercase_run, prompt, read_lines, saved_steps, untimed, write_records

STEP_KEYS = {
    "step",
    "reward/mean",
    "reward/std",
    "reward/instructions",
    "loss/policy",
    "loss/kl",
    "policy/entropy",
    "policy/ratio_max",
    "policy/clip_fraction",
    "mismatch/kl",
    "mismatch/cut_fraction",
    "grad_norm",
    "learning_rate",
    "response/length_mean",
    "response/truncated_fraction",
    "groups/uninformative_fraction",
    "tokens/trained",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
    "time/step_s",
    "tokens_per_s",
    "memory/peak_gib",
}


# A prompt that the seed of `lowercase_run` draws in its third step.
WILD = 11


def mixed_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run whose prompts are answerable and impossible by turns; a group of the latter has no spread."""
    return lowercase_run(folder, [prompt(n, IMPOSSIBLE if n % 2 else LOWERCASE) for n in range(24)], **sections)


def test_reward_rises(tmp_path: Path) -> None:
    run = train(lowercase_run(tmp_path, run={"steps": 40}, rollout={"group_size": 8}))
    assert run.status == 0
    rewards = [record["reward/mean"] for record in run.metrics]
    assert len(rewards) == 40
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.4


def test_a_step_records_every_key_with_a_finite_number(tmp_path: Path) -> None:
    run = train(lowercase_run(tmp_path, loss={"kl_coef": 0.1}))
    assert [record["step"] for record in run.metrics] == [0, 1, 2, 3]
    for record in run.metrics:
        assert record.keys() >= STEP_KEYS
        assert record.pop("engine") == "torch"
        assert all(math.isfinite(value) for value in record.values())
    assert all(record["loss/kl"] > 0 for record in run.metrics[1:])


def test_metrics_say_what_the_rollouts_were(tmp_path: Path) -> None:
    run = train(mixed_run(tmp_path))
    for record in run.metrics:
        rollouts = run.step(record["step"])
        rewards, trained = [r["reward"] for r in rollouts], [r for r in rollouts if r["trained"]]
        assert record["reward/mean"] == pytest.approx(np.mean(rewards))
        assert record["reward/std"] == pytest.approx(np.std(rewards, ddof=1))
        assert record["tokens/trained"] == sum(len(r["token_ids"]) for r in trained)
        assert record["response/length_mean"] == pytest.approx(np.mean([len(r["token_ids"]) for r in rollouts]))
        assert record["groups/uninformative_fraction"] == pytest.approx(1 - len(trained) / len(rollouts))


def test_updates_of_a_step_are_one_record() -> None:
    first = dict.fromkeys(UPDATE_KEYS, 1.0) | {"policy/ratio_max": 5.0, "tokens/trained": 10.0}
    second = dict.fromkeys(UPDATE_KEYS, 3.0) | {"tokens/trained": 4.0}
    expected = dict.fromkeys(UPDATE_KEYS, 2.0) | {"policy/ratio_max": 5.0, "tokens/trained": 14.0}
    assert update_metrics([first, second], [0.1, 0.2, 0.3]) == {**expected, "learning_rate": 0.2}


def test_equal_runs_are_equal_and_another_seed_is_another_run(tmp_path: Path) -> None:
    first, second = train(lowercase_run(tmp_path / "a")), train(lowercase_run(tmp_path / "b"))
    other = train(lowercase_run(tmp_path / "c"), "run.seed=4")
    assert untimed(first.metrics) == untimed(second.metrics)
    assert first.rollouts == second.rollouts
    assert first.rollouts != other.rollouts


def test_only_informative_groups_are_trained_and_the_others_are_named(tmp_path: Path) -> None:
    run = train(mixed_run(tmp_path))
    impossible = {f"p{n}" for n in range(1, 24, 2)}
    dropped = {record["prompt_id"] for record in run.rollouts if not record["trained"]}
    assert dropped & impossible
    for record in run.rollouts:
        assert record["prompt_id"] not in impossible or not record["trained"]
        assert (record["advantage"] != 0) == record["trained"]
    for step in range(4):
        assert sum(record["advantage"] for record in run.step(step)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("max_refills", [0, 1, 3])
def test_refills_replace_what_was_dropped_and_the_cursor_moves_past_them(tmp_path: Path, max_refills: int) -> None:
    run = train(mixed_run(tmp_path, advantage={"max_refills": max_refills}))
    cursor, refilled = 0, 0
    for step in range(4):
        groups = {record["draw"]: record["trained"] for record in run.step(step)}
        wanted, drawn = 4, []
        for _ in range(1 + max_refills):
            drawn += range(cursor + len(drawn), cursor + len(drawn) + wanted)
            wanted = 4 - sum(groups[draw] for draw in drawn)
            if wanted == 0:
                break
        assert list(groups) == drawn
        cursor += len(drawn)
        refilled += len(drawn) - 4
    assert (refilled > 0) == (max_refills > 0)


def test_a_step_without_informative_groups_trains_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(lowercase_run(tmp_path, [prompt(n, IMPOSSIBLE) for n in range(8)], loss={"kl_coef": 0.1}))
    assert run.status == 0
    assert set(run.trainer.calls) == {"sample"}
    untrained = NumpyTrainer(load_config([tmp_path / "run.yaml"]).config, run.trainer.table.shape[1])
    np.testing.assert_array_equal(run.trainer.table, untrained.table)
    assert [record["tokens/trained"] for record in run.metrics] == [0.0] * 4
    assert {record["policy_version"] for record in run.rollouts} == {0}
    assert "step 2: no update, since none of its 4 groups was informative" in capsys.readouterr().out
    assert saved_steps(run.folder) == [2, 4]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, {"update": 4}),
        ({"old_logprobs": "sampler"}, {"update": 4}),
        ({"old_logprobs": "recompute"}, {"update": 4, "policy": 4}),
        ({"kl_coef": 0.1}, {"update": 4, "reference": 4}),
        (
            {"old_logprobs": "recompute", "updates_per_rollout": 2, "kl_coef": 0.1},
            {"update": 8, "policy": 8, "reference": 8},
        ),
    ],
    ids=["detach", "sampler", "recompute", "reference", "all of it twice"],
)
def test_the_trainer_is_asked_for_what_the_loss_needs(
    tmp_path: Path, loss: dict[str, Any], expected: dict[str, int]
) -> None:
    run = train(lowercase_run(tmp_path, loss=loss, advantage={"type": "floor"}))
    assert run.trainer.calls == {"sample": 4, **expected}


def test_updates_of_one_rollout_share_its_old_policy(tmp_path: Path) -> None:
    run = train(lowercase_run(tmp_path, loss={"old_logprobs": "recompute", "updates_per_rollout": 2}))
    assert run.trainer.calls["update"] > 4
    # Recomputed before the first update, so the sampler's policy is the old one for both of them...
    assert [record["mismatch/kl"] for record in run.metrics] == pytest.approx([0.0] * 4, abs=1e-9)
    # ...and the second one finds a policy that has moved.
    assert max(record["policy/ratio_max"] for record in run.metrics) > 1.1
    versions = [run.step(step)[0]["policy_version"] for step in range(4)]
    assert versions[0] == 0
    assert set(np.diff(versions)) <= {1, 2}


def test_on_policy_ratios_are_one(tmp_path: Path) -> None:
    run = train(lowercase_run(tmp_path))
    assert [record["policy/ratio_max"] for record in run.metrics] == [1.0] * 4
    assert [record["policy/clip_fraction"] for record in run.metrics] == [0.0] * 4


def test_fewer_informative_groups_than_updates_make_fewer_updates(tmp_path: Path) -> None:
    records = [prompt(n, LOWERCASE if n == 0 else IMPOSSIBLE) for n in range(4)]
    loss = {"old_logprobs": "recompute", "updates_per_rollout": 2}
    run_file = lowercase_run(tmp_path, records, loss=loss, optimizer={"warmup_fraction": 1.0})
    run = train(run_file)
    config = load_config([run_file]).config
    taught = [record for record in run.metrics if record["tokens/trained"]]
    assert taught
    assert run.trainer.calls["update"] == len(taught)
    for record in taught:
        assert record["learning_rate"] == learning_rate(config.optimizer, 2 * record["step"], 8)


def test_learning_rates_follow_the_schedule(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path, optimizer={"warmup_fraction": 0.5, "floor_fraction": 0.1})
    run = train(run_file)
    rule = load_config([run_file]).config.optimizer
    planned = [learning_rate(rule, update, 4) for update in range(4)]
    assert [record["learning_rate"] for record in run.metrics] == planned
    assert len(set(planned)) == 4


def test_held_out_prompts_are_evaluated_at_both_ends_and_between(tmp_path: Path) -> None:
    run = train(lowercase_run(tmp_path, run={"steps": 5}, evaluation={"at_ends": True, "every": 2, "samples": 2}))
    evaluations = read_lines(run.folder / "evaluation.jsonl")
    assert [record["step"] for record in evaluations] == [0, 2, 4, 5]
    assert all(math.isfinite(value) for record in evaluations for value in record.values())
    assert {"reward/mean", "reward/instructions"} <= evaluations[0].keys()
    # Twelve prompts, two samples: a score is a multiple of 1/24.
    assert all((24 * record["reward/mean"]) % 1 == pytest.approx(0, abs=1e-9) for record in evaluations)


def test_two_evaluations_of_one_policy_are_equal(tmp_path: Path) -> None:
    hard, easy = [prompt(n, IMPOSSIBLE) for n in range(8)], [prompt(n, LOWERCASE) for n in range(8, 12)]
    heldout = write_records(tmp_path / "heldout.jsonl", easy)
    data = {"train": [{"path": str(tmp_path / "prompts.jsonl")}], "heldout": [{"path": str(heldout)}]}
    run = train(lowercase_run(tmp_path, hard, data=data, evaluation={"every": 2, "samples": 50}))
    first, second = untimed(read_lines(run.folder / "evaluation.jsonl"))
    assert first.pop("step") == 2
    assert second.pop("step") == 4
    assert first == second
    assert first["reward/mean"] > 0


def test_a_single_held_out_response_has_no_spread(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path, [prompt(0, LOWERCASE)], evaluation={"at_ends": True, "samples": 1})
    run = train(run_file)
    assert [record["reward/std"] for record in read_lines(run.folder / "evaluation.jsonl")] == [0.0, 0.0]


def overflowing_run(folder: Path) -> Path:
    """One prompt is worth so much that the square of its gradient overflows; it is drawn after the first checkpoint."""
    records = [prompt(n, LOWERCASE, label="wild" if n == WILD else "instruction_rule") for n in range(12)]
    return lowercase_run(
        folder,
        records,
        run={"steps": 20},
        rollout={"group_size": 8},
        rewards={"recipe": {"instruction_rule": {"instructions": 1.0}, "wild": {"instructions": 1e200}}},
        advantage={"type": "group_mean"},
        checkpoint={"every": 1},
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_non_finite_update_stops_with_its_batch_and_keeps_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(overflowing_run(tmp_path))
    assert run.status == 1
    reached = saved_steps(run.folder)
    assert reached
    step = reached[-1]
    assert len(run.metrics) == step
    file = run.folder / f"failed-batch-step-{step:06d}.npz"
    error = capsys.readouterr().err
    assert f"error: step {step}: loss " in error
    assert "gradient norm" in error
    assert f"its batch is in {file}" in error
    assert "optimizer.learning_rate" in error
    batch = np.load(file)
    assert not np.isfinite(batch["advantages"]).all()
    assert batch["token_ids"].shape == batch["advantages"].shape
