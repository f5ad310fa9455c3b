"""tunix's GRPO update: its trainer and its loss on its Qwen2, with random weights of its own. fp32 parameters, bf16
products, optax.adamw; `full` is its remat of decoder layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_step
from flax import nnx
from tunix.models.qwen2.model import ModelConfig, Qwen2, RematConfig
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.common import TrainExample
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

PAD, END = 0, 1  # tokens that no batch has
# What the loss reads of its GRPOConfig, which lives beside its samplers, and those need much more installed.
LOSS = SimpleNamespace(
    beta=0.0,
    epsilon=0.2,
    epsilon_high=0.2,
    epsilon_c=None,
    loss_algo="grpo",
    loss_agg_mode="token-mean",
    temperature=1.0,
    kl_loss_mode="kl",
    kl_clamp_value=None,
)


def trained(case: train_step.Case, checkpointing: bool, updates: int) -> tuple[list[float], float]:
    """Train; returns when each update ended, in seconds from the start of the first, and the peak of memory in GiB."""
    batches = microbatches(case)
    began, ends = 0.0, []

    def given() -> Iterator[TrainExample]:
        nonlocal began
        began = time.perf_counter()
        for _ in range(updates + 2):
            yield from batches
            jax.block_until_ready(nnx.state(trainer.model))
            ends.append(time.perf_counter() - began)

    configuration = TrainingConfig(eval_every_n_steps=10**6, gradient_accumulation_steps=len(batches))
    trainer = Trainer(model(case, checkpointing), optax.adamw(1e-6), configuration, dict)
    trainer.with_loss_fn(grpo_loss_fn, has_aux=True)
    trainer.with_gen_model_input_fn(
        lambda example: {"train_example": example, "algo_config": LOSS, "pad_id": PAD, "eos_id": END}
    )
    trainer.train(given())
    stats = jax.local_devices()[0].memory_stats() or {}
    return ends, stats.get("peak_bytes_in_use", 0) / 2**30


def model(case: train_step.Case, checkpointing: bool) -> Qwen2:
    """Random weights of the case's shapes."""
    shape = train_step.SHAPES[case.shape]
    heads = shape["num_attention_heads"]
    config = ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=heads,
        head_dim=shape["hidden_size"] // heads,
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=1e-6,
        use_tied_embedding=shape["tie_word_embeddings"],
        remat_config=RematConfig.DECODER if checkpointing else RematConfig.NONE,
        dtype=jnp.bfloat16,
    )
    return nnx.jit(lambda: Qwen2(config, rngs=nnx.Rngs(0)))()


def microbatches(case: train_step.Case) -> list[TrainExample]:
    """What tunix would have sampled, a micro-batch each."""
    rng, rows = np.random.default_rng(0), case.rows_per_microbatch
    vocabulary = min(100_000, train_step.SHAPES[case.shape]["vocab_size"])

    def tokens(count: int) -> Any:
        return jnp.asarray(rng.integers(2, vocabulary, (rows, count)), jnp.int32)

    return [
        TrainExample(
            prompt_ids=tokens(case.prompt),
            prompt_mask=jnp.ones((rows, case.prompt), jnp.int32),
            completion_ids=tokens(case.response),
            completion_mask=jnp.ones((rows, case.response), jnp.int32),
            advantages=jnp.asarray(rng.normal(size=rows), jnp.float32),
            ref_per_token_logps=None,
            old_per_token_logps=jnp.asarray(-12.0 + 0.1 * rng.normal(size=(rows, case.response)), jnp.float32),
        )
        for _ in range(case.sequences // rows)
    ]
