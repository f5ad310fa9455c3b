"""Checks that need more than one key: each problem is a dotted key and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

from common.config.run import RunConfig


def cross_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every inconsistency of a config, as (key to blame, sentence)."""
    yield from _group_checks(config)
    yield from _batch_checks(config)
    yield from _update_checks(config)
    yield from _loss_checks(config)
    yield from _evaluation_checks(config)
    yield from _recipe_checks(config)
    yield from _gate_checks(config)
    yield from _judge_checks(config)
    yield from _overlong_checks(config)


def warnings(config: RunConfig) -> Iterator[str]:
    """What a config may do and should know of, one sentence each."""
    for name, judge in config.rewards.judges.items():
        if judge.think_aware == "on":
            yield (
                f"rewards.judges.{name}.think_aware is on: a policy that is paid for innocent reasoning learns to hide "
                "what it thinks. With measure the reasoning is judged too, and nothing is paid for it."
            )


def _group_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    types = {config.advantage.type, *config.advantage.labels.values()}
    if config.rollout.group_size < 2 and types != {"floor"}:
        yield (
            "rollout.group_size",
            f"group-relative advantages ({', '.join(sorted(types - {'floor'}))}) need at least 2 responses per prompt. "
            "Set it to 2 or more.",
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.batch.row_tokens < longest:
        yield (
            "batch.row_tokens",
            f"a row must hold one whole sequence, up to {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_new_tokens). Set it to {longest} or more, or lower one of the two.",
        )


def _batch_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.batch.share_prompts and not config.batch.packed:
        yield "batch.share_prompts", "one sequence a row shares nothing. Set batch.packed to true, or this to false."


def _update_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    updates, prompts = config.loss.updates_per_rollout, config.rollout.prompts_per_step
    if prompts % updates:
        yield (
            "rollout.prompts_per_step",
            f"does not divide into loss.updates_per_rollout = {updates} updates of whole prompt groups. "
            f"Choose a multiple of {updates}.",
        )
    if updates > 1 and config.loss.old_logprobs == "detach":
        yield (
            "loss.old_logprobs",
            f"'detach' is right for one on-policy update, but loss.updates_per_rollout = {updates}. "
            "Set it to recompute or sampler.",
        )


def _loss_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    loss = config.loss
    if loss.importance.type != "none" and loss.old_logprobs != "recompute":
        yield (
            "loss.importance.type",
            f"importance weights compare the trainer's own old logprobs with the sampler's, but loss.old_logprobs = "
            f"{loss.old_logprobs}. Set loss.old_logprobs to recompute.",
        )
    if loss.importance.type == "icepop" and loss.importance.low >= loss.importance.high:
        yield "loss.importance.low", f"must be below loss.importance.high = {loss.importance.high}."
    if loss.type in ("ppo_clip", "cpg", "cpgd", "gspo") and loss.clip_low >= 1:
        yield "loss.clip_low", f"{loss.type} clips the ratio to 1 - clip_low, which must stay above 0. Choose below 1."
    if loss.type == "gspo" and loss.aggregation != "sequence_mean":
        yield "loss.aggregation", "gspo weighs whole responses. Set it to sequence_mean, or leave it out."
    if loss.type == "cross_entropy" and loss.kl_type == "k1_reward" and loss.kl_coef > 0:
        yield "loss.kl_type", "k1_reward acts on advantages, which cross_entropy does not read. Set it to k3_loss."
    if config.rollout.temperature == 0:
        yield "rollout.temperature", "training needs responses that differ. Choose a temperature above 0."


def _evaluation_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    if (config.evaluation.at_ends or config.evaluation.every) and not config.data.heldout:
        yield (
            "data.heldout",
            "held-out evaluation is on and has no prompts. Name a file, or set evaluation.at_ends to false and "
            "evaluation.every to 0.",
        )
    if config.evaluation.weights == "ema" and config.ema.decay is None:
        yield "evaluation.weights", "there is no average of the weights. Set ema.decay, or this to policy."


def _overlong_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    limit = config.rollout.max_new_tokens
    for name, verifier in config.rewards.verifiers.items():
        longest = verifier.options.get("max_length")
        if verifier.rule == "overlong" and isinstance(longest, int) and longest > limit:
            yield (
                f"rewards.verifiers.{name}.options.max_length",
                f"responses end at rollout.max_new_tokens = {limit}, so the full penalty is never reached. "
                f"Set it to {limit} or less.",
            )


def _judge_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    judges = config.rewards.judges
    for name, verifier in config.rewards.verifiers.items():
        if verifier.judge is not None and verifier.judge not in judges:
            yield (
                f"rewards.verifiers.{name}.judge",
                f"no judge of this name. Known: {', '.join(sorted(judges)) or 'none'}. Include its file of "
                "configs/judge, add it under rewards.judges, or correct the name.",
            )
        if verifier.judge is not None and verifier.options:
            yield f"rewards.verifiers.{name}.options", "a judge has none; it is described under rewards.judges."
    for name, judge in judges.items():
        if judge.server not in config.servers:
            yield (
                f"rewards.judges.{name}.server",
                f"no server of this name. Known: {', '.join(sorted(config.servers)) or 'none'}. Add it under servers "
                "or correct the name.",
            )


def _recipe_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    verifiers = config.rewards.verifiers
    for name, verifier in verifiers.items():
        kinds = (verifier.rule, verifier.judge, verifier.reward_model)
        if len([kind for kind in kinds if kind is not None]) != 1:
            yield f"rewards.verifiers.{name}", "needs a rule, a judge or a reward_model. Set exactly one of the three."
    for label, terms in config.rewards.recipe.items():
        if not terms:
            yield f"rewards.recipe.{label}", "has no terms, so every response would score 0. Name a verifier."
        for name, weight in terms.items():
            if name not in verifiers:
                yield f"rewards.recipe.{label}.{name}", _no_verifier(config)
            elif weight < 0 and _lowest(config, name) is not None:
                yield (
                    f"rewards.recipe.{label}.{name}",
                    "would pay most for the empty answer, which a judge gives its lowest score. Turn the judge around "
                    "(the scores of its verdicts, or what its prompt asks a number for), and weigh it positively.",
                )
    for label in config.advantage.labels:
        if label not in config.rewards.recipe:
            yield "advantage.labels", f"{label!r}: rewards.recipe has no such label. Correct the name or add it there."


def _gate_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    verifiers, kinds = config.rewards.verifiers, config.advantage
    for label, names in config.rewards.gates.items():
        for name in names:
            if name not in verifiers:
                yield f"rewards.gates.{label}", f"{name!r}: {_no_verifier(config)}"
            elif not _may_gate(config, name):
                yield (
                    f"rewards.gates.{label}",
                    f"{name!r} may score below 0, and a gate of that sort would turn bad totals into good ones. Make "
                    "it a term, or choose a verifier with scores from 0 up.",
                )
        if len(set(names)) < len(names):
            yield f"rewards.gates.{label}", "names a verifier twice, which would multiply by it twice. Name it once."
        terms = config.rewards.recipe.get(label, {})
        below = [name for name in terms if name in verifiers and not _may_gate(config, name)]
        if names and below:
            yield (
                f"rewards.gates.{label}",
                f"would make totals below 0 better by multiplying them, and the term {below[0]!r} may score below 0. "
                "Remove the gates or that term, or turn the term into one from 0 up.",
            )
        if label not in config.rewards.recipe:
            yield f"rewards.gates.{label}", "rewards.recipe has no terms for this label. Add them or correct the name."
        if kinds.labels.get(label, kinds.type) == "gdpo":
            yield (
                f"rewards.gates.{label}",
                "gdpo normalises each verifier alone, before any total is made that a gate could multiply. "
                "Remove the gate or choose another type of advantages.",
            )


def _lowest(config: RunConfig, name: str) -> float | None:
    """The lowest score of a verifier, which its empty answers get; None where there is no such score."""
    judge = config.rewards.judges.get(config.rewards.verifiers[name].judge or "")
    return None if judge is None else judge.read_out.lowest


def _may_gate(config: RunConfig, name: str) -> bool:
    """Whether no score of a verifier is negative, as far as its section says."""
    verifier = config.rewards.verifiers[name]
    judge = config.rewards.judges.get(verifier.judge or "")
    return verifier.rule != "overlong" and (judge is None or judge.may_multiply)


def _no_verifier(config: RunConfig) -> str:
    known = ", ".join(sorted(config.rewards.verifiers)) or "none"
    return f"no verifier of this name. Known: {known}. Add it under rewards.verifiers or correct the name."
