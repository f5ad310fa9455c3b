"""The sections that choose the method: advantages, loss, importance correction and optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config.section import (
    BelowOne,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

# Each loss was published with its own clip; a config that names none gets these (low, high).
CLIP_DEFAULTS = {
    "ppo_clip": (0.2, 0.2),
    "cpg": (0.2, 0.2),
    "cpgd": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 5.0),
    "cross_entropy": (0.2, 0.2),
}

# Estimators that other tools accept and that do not do what they are asked for (arXiv 2510.01555, 2512.21852).
REFUSED_KL = {
    "k1_loss": "k1 as a loss has an expected gradient of zero on-policy and only adds noise; use k2_loss",
    "k3_reward": "k3 in the reward mixes reverse and forward KL and training collapses; use k1_reward or k3_loss",
}


AdvantageType = Literal["group_std", "group_mean", "group_mean_batch_std", "rloo", "floor", "gdpo"]


class AdvantageConfig(Section):
    """How rewards become advantages.

    labels: the type of a label that has one of its own, such as `group_mean` or `floor` for ordinal scores, whose sizes
    a standard deviation would erase. Statistics over the batch span the groups of one type.
    floor_threshold is read by `floor` alone; ddof and eps by the types that divide by a standard deviation.
    An uninformative group (no spread in what is trained on) is dropped and replaced by a fresh prompt, up to
    `max_refills` further draws of `rollout.prompts_per_step` prompts a step; 0 keeps the smaller step.
    """

    type: AdvantageType = "group_std"
    labels: dict[str, AdvantageType] = Field(default_factory=dict)
    ddof: Annotated[int, Field(ge=0, le=1)] = 1
    eps: PositiveFloat = 1e-6
    floor_threshold: float = 1.0
    max_refills: NonNegativeInt = 0


class ImportanceConfig(Section):
    """Correction for a sampler that disagrees with the trainer: weights of pi_old / pi_sampler on the policy term.

    token_tis: min(ratio, cap) per token. sequence_tis: min(product over the response, cap). icepop: the ratio where it
    lies in [low, high], else 0.
    """

    type: Literal["none", "token_tis", "sequence_tis", "icepop"] = "none"
    cap: PositiveFloat = 2.0
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 5.0


class LossConfig(Section):
    """The policy loss, its KL penalty against the reference model, and how token losses are summed.

    clip_low and clip_high default to what each loss was published with, and gspo to `sequence_mean`, the only
    aggregation it is defined for. cross_entropy imitates every response of an informative group, whatever its reward.
    """

    type: Literal["ppo_clip", "cpg", "cpgd", "gspo", "cispo", "cross_entropy"] = "ppo_clip"
    clip_low: PositiveFloat = CLIP_DEFAULTS["ppo_clip"][0]
    clip_high: PositiveFloat = CLIP_DEFAULTS["ppo_clip"][1]
    drift_coef: NonNegativeFloat = 0.001
    drift_cap: PositiveFloat = 2.0
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    kl_type: Literal["k1_reward", "k2_loss", "k3_loss", "rho_k3_loss"] = "k3_loss"
    kl_coef: NonNegativeFloat = 0.0
    old_logprobs: Literal["detach", "recompute", "sampler"] = "detach"
    updates_per_rollout: PositiveInt = 1
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)

    @field_validator("kl_type", mode="before")
    @classmethod
    def _explain_refused_kl(cls, value: Any) -> Any:
        if isinstance(value, str) and value in REFUSED_KL:
            raise ValueError(REFUSED_KL[value])
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_by_type(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        low, high = CLIP_DEFAULTS.get(str(data.get("type")), CLIP_DEFAULTS["ppo_clip"])
        own = {"aggregation": "sequence_mean"} if data.get("type") == "gspo" else {}
        return {"clip_low": low, "clip_high": high, **own, **data}


class OptimizerConfig(Section):
    """AdamW: eps outside the root, decoupled decay on matrices only, bias correction, one global-norm clip before the
    step; linear warm-up over `warmup_fraction` of all updates, then cosine down to `floor_fraction` of the peak.
    """

    learning_rate: PositiveFloat = 1e-6
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    warmup_fraction: Fraction = 0.03
    floor_fraction: Fraction = 0.1
