"""Small numeric bugs, each as a text and its replacement in one source file, with what must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted bug.

    file: where, from the root of the repository. old: a text that stands there once. caught_by: for `common`, a test in
    tests/common/algorithms that must fail; for an engine, the start of the name of a rung of the ladder.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str

    @property
    def engine(self) -> str | None:
        """The engine that the bug is planted in; None for the mathematics in `common`."""
        root = self.file.partition("/")[0]
        return root.removeprefix("safework_") if root.startswith("safework_") else None


ADVANTAGES = "common/algorithms/advantages.py"
LOSSES = "common/algorithms/losses.py"
OBJECTIVE = "common/algorithms/objective.py"
WEIGHTS = "common/algorithms/weights.py"
SCHEDULE = "common/algorithms/schedule.py"

_ADVANTAGES = [
    Mutant(
        "group_std ignores ddof",
        ADVANTAGES,
        "totals.std(axis=1, ddof=ddof, keepdims=True) + eps",
        "totals.std(axis=1, keepdims=True) + eps",
        "test_advantages.py::test_group_std_of_one_one_zero_zero",
    ),
    Mutant(
        "group_std adds eps inside the root",
        ADVANTAGES,
        "(totals.std(axis=1, ddof=ddof, keepdims=True) + eps)",
        "np.sqrt(totals.var(axis=1, ddof=ddof, keepdims=True) + eps)",
        "test_advantages.py::test_group_std_adds_eps_outside_the_root",
    ),
    Mutant(
        "group_std is not centred",
        ADVANTAGES,
        "group_mean(totals) / (totals.std(axis=1",
        "totals / (totals.std(axis=1",
        "test_advantages.py::test_each_group_has_its_own_mean_and_std",
    ),
    Mutant(
        "group_mean_batch_std divides by the group's deviation",
        ADVANTAGES,
        "(totals.std(ddof=ddof) + eps)",
        "(totals.std(axis=1, ddof=ddof, keepdims=True) + eps)",
        "test_advantages.py::test_group_mean_batch_std",
    ),
    Mutant("rloo divides by G", ADVANTAGES, "/ (size - 1)", "/ size", "test_advantages.py::test_rloo"),
    Mutant(
        "floor takes the smaller baseline",
        ADVANTAGES,
        "np.maximum(totals.mean",
        "np.minimum(totals.mean",
        "test_advantages.py::test_floor",
    ),
    Mutant(
        "gdpo fills absent scores with zeros",
        ADVANTAGES,
        "np.where(present, scores - held.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)",
        "held - held.mean(axis=1, keepdims=True)",
        "test_advantages.py::test_gdpo_counts_present_scores_only",
    ),
    Mutant(
        "gdpo divides by the group size, absent scores included",
        ADVANTAGES,
        "np.maximum(count - ddof, 1)",
        "(present.shape[1] - ddof)",
        "test_advantages.py::test_gdpo_takes_ddof_off_the_number_of_present_scores",
    ),
    Mutant(
        "gdpo divides by the number of verifiers, not its root",
        ADVANTAGES,
        "np.sqrt(np.maximum(active.sum(axis=2), 1))",
        "np.maximum(active.sum(axis=2), 1)",
        "test_advantages.py::test_gdpo_of_two_verifiers",
    ),
    Mutant(
        "gdpo ignores the recipe's weights",
        ADVANTAGES,
        "(normalised * term_weights[:, None, :])",
        "normalised",
        "test_advantages.py::test_gdpo_gives_labels_their_own_weights_and_counts",
    ),
    Mutant(
        "gdpo keeps a group only if every verifier spreads",
        ADVANTAGES,
        "& (term_weights != 0)).any(axis=1)",
        "& (term_weights != 0)).all(axis=1)",
        "test_advantages.py::test_informative",
    ),
]

_LOSSES = [
    Mutant(
        "ppo clips both sides by clip_low",
        LOSSES,
        "1.0 - clip_low, 1.0 + clip_high)",
        "1.0 - clip_low, 1.0 + clip_low)",
        "test_losses.py::test_ppo_clip",
    ),
    Mutant(
        "ppo takes the optimistic bound",
        LOSSES,
        "-xp.minimum(ratio * advantages",
        "-xp.maximum(ratio * advantages",
        "test_losses.py::test_ppo_clip",
    ),
    Mutant(
        "cpg clips the side that A does not push to",
        LOSSES,
        "xp.where(advantages > 0, upper, lower)",
        "xp.where(advantages > 0, lower, upper)",
        "test_losses.py::test_cpg",
    ),
    Mutant(
        "drift weighs by the ratio, not its excess",
        LOSSES,
        "xp.expm1(stop_gradient(logprobs) - old)",
        "xp.exp(stop_gradient(logprobs) - old)",
        "test_losses.py::test_the_slope_of_the_drift_is_the_capped_excess_of_the_ratio",
    ),
    Mutant(
        "drift is not capped",
        LOSSES,
        "xp.clip(excess, -1.0, cap) * logprobs",
        "excess * logprobs",
        "test_losses.py::test_the_slope_of_the_drift_is_the_capped_excess_of_the_ratio",
    ),
    Mutant(
        "cpgd leaves the drift out",
        LOSSES,
        " + config.drift_coef * drift",
        " + 0.0 * drift",
        "test_losses.py::test_cpgd_is_cpg_plus_its_share_of_drift",
    ),
    Mutant(
        "gspo averages over all tokens of a sequence",
        LOSSES,
        "xp.where(sampled, xp.ones_like(log_ratio), xp.zeros_like(log_ratio))",
        "xp.ones_like(log_ratio)",
        "test_losses.py::test_sequence_log_ratio_is_the_mean_over_sampled_tokens",
    ),
    Mutant(
        "gspo differentiates the mean too",
        LOSSES,
        "sequence_log_ratio(stop_gradient(logprobs) - old",
        "sequence_log_ratio(logprobs - old",
        "test_losses.py::test_gspo_has_the_gradient_of_the_sequence_level_objective",
    ),
    Mutant(
        "gspo rounds its ratio to the size of the logprob",
        LOSSES,
        "mean + (logprobs - stop_gradient(logprobs))",
        "mean + logprobs - stop_gradient(logprobs)",
        "test_losses.py::test_gspo_loses_no_digits_to_large_logprobs",
    ),
    Mutant(
        "cispo differentiates its weight",
        LOSSES,
        "xp.clip(xp.exp(stop_gradient(logprobs) - old), 0.0",
        "xp.clip(xp.exp(logprobs - old), 0.0",
        "test_losses.py::test_cispo",
    ),
    Mutant(
        "k2 lacks its half",
        LOSSES,
        "0.5 * (logprobs - ref) ** 2",
        "(logprobs - ref) ** 2",
        "test_losses.py::test_kl_values_and_slopes",
    ),
    Mutant(
        "k3 has its sign turned",
        LOSSES,
        "xp.expm1(ref - logprobs) - (ref - logprobs)",
        "xp.expm1(logprobs - ref) - (logprobs - ref)",
        "test_losses.py::test_k3_as_a_loss_follows_the_forward_kl",
    ),
    Mutant(
        "rho k3 holds rho constant",
        LOSSES,
        "xp.exp(logprobs - sampling) * k3",
        "xp.exp(stop_gradient(logprobs) - sampling) * k3",
        "test_losses.py::test_rho_k3_follows_the_reverse_kl_whoever_sampled",
    ),
]

_OBJECTIVE = [
    Mutant(
        "k1_reward lacks its coefficient",
        OBJECTIVE,
        "advantages - config.kl_coef * k1(",
        "advantages - k1(",
        "test_objective.py::test_k1_in_the_reward_lowers_the_advantage_by_the_old_policys_log_ratio",
    ),
    Mutant(
        "k1_reward rewards the distance",
        OBJECTIVE,
        "advantages - config.kl_coef * k1(",
        "advantages + config.kl_coef * k1(",
        "test_objective.py::test_k1_in_the_reward_equals_k2_as_a_loss_on_policy",
    ),
    Mutant(
        "kl is weighed by the policy's weights",
        OBJECTIVE,
        "arrays.kl_weights * penalty",
        "arrays.policy_weights * penalty",
        "test_objective.py::test_kl_has_its_own_weights_and_coefficient",
    ),
    Mutant(
        "mismatch is the kl the other way round",
        OBJECTIVE,
        "(xp.expm1(-mismatch) + mismatch)",
        "(xp.expm1(mismatch) - mismatch)",
        "test_objective.py::test_mismatch_is_the_kl_from_the_sampler_to_the_trainer",
    ),
    Mutant(
        "clipped counts tokens that are free to come back",
        OBJECTIVE,
        "(below & (advantages < 0))",
        "below",
        "test_objective.py::test_clipped_counts_the_tokens_that_the_clip_holds",
    ),
    Mutant(
        "the ratio's maximum covers tokens that are not trained",
        OBJECTIVE,
        "(xp.exp(log_ratio * trained) * trained).max()",
        "xp.exp(log_ratio).max()",
        "test_objective.py::test_tokens_entropy_and_ratio_cover_trained_tokens_alone",
    ),
    Mutant(
        "micro-batches keep the smaller maximum",
        OBJECTIVE,
        "namespace(left.ratio_max).maximum(",
        "namespace(left.ratio_max).minimum(",
        "test_objective.py::test_micro_batches_add_up",
    ),
    Mutant(
        "segments of one id in two rows are one sequence",
        "common/arrays.py",
        "row_index * (tokens + 1) + segment_ids",
        "row_index * 0 + segment_ids",
        "test_losses.py::test_sequence_sums_stay_within_segment_and_row",
    ),
]

_WEIGHTS = [
    Mutant(
        "importance weights are renormalised",
        WEIGHTS,
        "return np.where(sampled, factor, 1.0)",
        "return np.where(sampled, factor / factor[sampled].mean(), 1.0)",
        "test_weights.py::test_token_tis_caps_each_ratio",
    ),
    Mutant(
        "importance weights reach tokens that were not sampled",
        WEIGHTS,
        "return np.where(sampled, factor, 1.0)",
        "return np.where(sampled, factor, 0.0)",
        "test_weights.py::test_token_tis_caps_each_ratio",
    ),
    Mutant(
        "sequence_tis takes the ratio of the token",
        WEIGHTS,
        "np.minimum(sequence_sum(log_ratio, segment_ids), np.log(config.cap))",
        "np.minimum(log_ratio, np.log(config.cap))",
        "test_weights.py::test_sequence_tis_caps_each_product",
    ),
    Mutant(
        "icepop keeps tokens outside its band",
        WEIGHTS,
        "ratio, 0.0)",
        "ratio, 1.0)",
        "test_weights.py::test_icepop_keeps_ratios_inside_its_band_and_drops_the_rest",
    ),
    Mutant(
        "sequence_mean sums over sequences",
        WEIGHTS,
        "1.0 / (lengths * len(lengths))",
        "1.0 / lengths",
        "test_weights.py::test_sequence_mean",
    ),
    Mutant(
        "fixed_length counts sequences after drops",
        WEIGHTS,
        "(max_length * num_before_drops)",
        "(max_length * len(lengths))",
        "test_weights.py::test_fixed_length_counts_sequences_before_drops",
    ),
    Mutant(
        "warm-up starts at zero",
        SCHEDULE,
        "(update + 1) / warmup",
        "update / warmup",
        "test_schedule.py::test_the_whole_curve",
    ),
    Mutant(
        "the cosine is one update late",
        SCHEDULE,
        "(update - warmup + 1) / max(1",
        "(update - warmup) / max(1",
        "test_schedule.py::test_warm_up_ends_at_the_peak_and_the_run_at_the_floor",
    ),
]

ALGORITHM_MUTANTS = (*_ADVANTAGES, *_LOSSES, *_OBJECTIVE, *_WEIGHTS)
