"""`safework plan` for GPUs: the trainer's model in shards on meta devices, and what training holds beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from common.config import ConfigError, LoadedConfig, RunConfig
from common.config.sentences import sentence
from common.data.model_config import head_dim, num_kv_heads
from common.plan.model import forward_flops, frozen_notes, planned_model
from common.plan.remedy import Settings, less_memory, with_remedy
from common.plan.report import Plan, ProgramPlan
from common.plan.target import Target
from safework_torch.compiled import Rows, layer_bytes
from safework_torch.config import TorchSection
from safework_torch.model import freeze, model_without_weights
from safework_torch.sharding import Whole, local
from safework_torch.token_logprobs import CHUNK

_GPUS_OF_A_HOST = 8
_DTYPE = torch.bfloat16
_WIDTH = _DTYPE.itemsize


class _Job(NamedTuple):
    """What is planned: a config, its model, the GPUs, and which programs."""

    config: RunConfig
    section: TorchSection
    hf: dict[str, Any]
    model: PreTrainedConfig
    target: Target
    parts: tuple[str, ...]

    @property
    def rows(self) -> Rows:
        """Those of one GPU."""
        batch = self.config.batch
        return Rows(batch.rows_per_microbatch // self.target.num_chips, batch.row_tokens)


class _Weights(NamedTuple):
    """Numbers of weights: all, those that a GPU holds between updates, those of each that are trained, of one layer, of
    what is outside layers, and of the matrix of the head.
    """

    all: int
    own: int
    trained: int
    own_trained: int
    layer: int
    outside: int
    head: int


def plan(loaded: LoadedConfig, target: Target, parts: tuple[str, ...]) -> Plan:
    """Count what a config's training needs of GPUs; where that is too much, try smaller changes.

    Needs the model's config.json alone. Raises ConfigError for what is not counted, and for rows that do not divide.
    """
    if loaded.config.backend.dtype != "bfloat16":
        problem, origin = "GPUs are planned for in bfloat16 alone. Set it to bfloat16.", loaded.origin("backend.dtype")
        raise ConfigError(sentence("backend.dtype", loaded.config.backend.dtype, origin, problem))
    rows = loaded.config.batch.rows_per_microbatch
    if rows % target.num_chips:
        problem = f"does not divide over the {target.num_chips} GPUs of {target.name}. Choose a multiple of that."
        origin = loaded.origin("batch.rows_per_microbatch")
        raise ConfigError(sentence("batch.rows_per_microbatch", rows, origin, problem))
    if target.num_chips > _GPUS_OF_A_HOST and target.num_chips % _GPUS_OF_A_HOST:
        raise ConfigError(f"--target {target.name}: hosts have {_GPUS_OF_A_HOST} GPUs. Choose a multiple of that.")
    hf = planned_model(loaded)
    model = AutoConfig.for_model(**hf)

    def counted(changed: LoadedConfig, some: tuple[str, ...]) -> Plan:
        return _counted(_Job(changed.config, _section(changed), hf, model, target, some))

    def changes(changed: LoadedConfig) -> Iterator[Settings]:
        return _changes(changed, target.num_chips)

    if target.num_chips > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(min(_GPUS_OF_A_HOST, target.num_chips))
        dist.init_process_group("fake", rank=0, world_size=target.num_chips, store=FakeStore())
    try:
        return with_remedy(loaded, parts, counted, changes, "counted")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _counted(job: _Job) -> Plan:
    """Each part of the job, and what lies on a GPU all the time."""
    weights, config = _weights(job), job.config
    moments = 0 if config.backend.offload_optimizer else 8 * weights.own_trained
    masters = 0 if job.section.offload_parameters else 4 * weights.own
    kinds = {"parameters, fp32": masters, "moments": moments}
    if job.target.num_chips == 1:
        kinds["parameters, bf16"] = _WIDTH * weights.own
    if config.ema.decay is not None:
        kinds["average"] = masters
    if config.loss.kl_coef and not config.backend.offload_reference:
        kinds["reference"] = _WIDTH * weights.own
    held = sum(kinds.values())
    programs = []
    for part, counted in (("update", _update), ("logprobs", _logprobs), ("sampling", _sampling)):
        if part in job.parts:
            temporaries, work, sent = counted(job, weights)
            work /= job.target.num_chips
            floor = work / job.target.chip.bf16_flops
            programs.append(ProgramPlan(part, held, temporaries, 0, work, sent, {}, 0.0, floor, 0.0))
    note = (
        "Counted, not compiled: responses as long as they may become, two micro-batches or more, a reference of the "
        "policy's size, no time but that of the FLOP at the peak."
    )
    return Plan(job.target, kinds, tuple(programs), (note, *frozen_notes(config)))


_Found = tuple[int, float, dict[str, int]]  # temporaries, FLOP of all GPUs, bytes sent


def _weights(job: _Job) -> _Weights:
    model: PreTrainedModel = model_without_weights(job.model, torch.float32)
    everything = sum(weight.numel() for weight in model.parameters())
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    head = job.model.vocab_size * job.model.hidden_size
    outside = everything - layer * job.model.num_hidden_layers
    freeze(model, job.config.model.frozen)
    own = [(weight, local(weight).numel()) for weight in Whole(model, job.section.sharding, _DTYPE).model.parameters()]
    trained = sum(weight.numel() for weight, _ in own if weight.requires_grad)
    own_trained = sum(count for weight, count in own if weight.requires_grad)
    return _Weights(everything, sum(count for _, count in own), trained, own_trained, layer, outside, head)


def _update(job: _Job, weights: _Weights) -> _Found:
    """The larger of two moments of a micro-batch: in the head, and in the last layer's backward pass."""
    recompute = job.config.backend.recompute
    layer = layer_bytes(job.model, _DTYPE, job.rows, recompute, job.section.compile)
    kept = job.model.num_hidden_layers * layer.kept + _outside_layers(job)
    head = _head(job, weights, recompute == "none", backward=True)
    passes = kept + max(head, layer.backward + _WIDTH * weights.head)
    again = 1 if recompute == "full" else 0
    work = (3 + again) * _forward(job)
    several = job.target.num_chips > 1
    copies = 0 if several else _WIDTH * weights.all
    temporaries = _gradients(job, weights) + max(passes, copies, _visitors(job, weights))
    if several:
        temporaries += _gathered(job, weights) + _reduced(job, weights)
    return temporaries, work, _sent(job, weights)


def _gradients(job: _Job, weights: _Weights) -> int:
    """Of the micro-batches before, fp32: whole under zero1, or else where the weights are, which may be the host."""
    if job.target.num_chips > 1 and job.section.sharding == "zero1":
        return 4 * weights.trained
    return 0 if job.section.offload_parameters else 4 * weights.own_trained


def _visitors(job: _Job, weights: _Weights) -> int:
    """What rests on the host and comes for the step of a layer, or of what is outside layers: moments; weights and
    gradients.
    """
    resting = job.config.backend.offload_optimizer + job.section.offload_parameters
    return 8 * resting * max(weights.layer, weights.outside) * weights.own // weights.all


def _gathered(job: _Job, weights: _Weights) -> int:
    """Whole weights in the dtype of products: all, or those outside layers and two layers; and what arrives."""
    if job.section.sharding in ("zero1", "zero2"):
        return _WIDTH * weights.all
    return _WIDTH * (weights.outside + 3 * weights.layer)


def _reduced(job: _Job, weights: _Weights) -> int:
    """A layer's gradients on their way to the other GPUs, fp32."""
    return 0 if job.section.sharding == "zero1" else 4 * weights.layer


def _outside_layers(job: _Job) -> int:
    """What embedding and final norm keep: the first layer's input, and that of the norm in fp32 twice."""
    return job.rows.number * job.rows.length * job.model.hidden_size * (2 * _WIDTH + 2 * 4)


def _sampled(job: _Job) -> int:
    """At most: of a row with one sequence its response, of a packed one all, since prompts may be short."""
    row = job.rows.length if job.config.batch.packed else min(job.config.rollout.max_new_tokens, job.rows.length)
    return job.rows.number * row


def _head(job: _Job, weights: _Weights, keeps: bool, *, backward: bool) -> int:
    """Logits of a chunk or, kept, of all; hidden states and their gradient; the head's gradient in fp32 and as it is
    handed on.
    """
    sampled, vocabulary, width = _sampled(job), job.model.vocab_size, job.model.hidden_size
    logits = (sampled if keeps else min(CHUNK["cuda"], sampled)) * vocabulary * _WIDTH
    hidden = sampled * width * _WIDTH
    return logits + hidden + ((4 + _WIDTH) * weights.head + hidden if backward else 0)


def _logprobs(job: _Job, weights: _Weights) -> _Found:
    layer = layer_bytes(job.model, _DTYPE, job.rows, "none", job.section.compile)
    temporaries = 2 * layer.kept + _outside_layers(job) + _head(job, weights, keeps=False, backward=False)
    if job.target.num_chips > 1:
        temporaries += _gathered(job, weights)
    elif job.config.loss.kl_coef and job.config.backend.offload_reference:
        temporaries += _WIDTH * weights.all
    return temporaries, _forward(job), _sent_once(job, weights)


def _sampling(job: _Job, weights: _Weights) -> _Found:
    """The embedded sampler's: whole weights, query, key and value and gate and up once more side by side, keys and
    values of prompts and of `rollout.rows` responses, and logits in fp32 three times. Work is that of one token a row.
    """
    model, rollout, data = job.model, job.config.rollout, job.config.data
    keys = 2 * num_kv_heads(job.hf) * head_dim(job.hf)
    beside = model.hidden_size * (model.num_attention_heads * head_dim(job.hf) + keys + 2 * model.intermediate_size)
    prompts = -(-rollout.rows // rollout.group_size)
    slots = (rollout.rows + prompts) * (data.max_prompt_tokens + rollout.max_new_tokens)
    cache = slots * model.num_hidden_layers * keys * _WIDTH
    whole = weights.all if job.target.num_chips > 1 else 0
    copies = _WIDTH * (whole + model.num_hidden_layers * beside)
    logits = 3 * 4 * rollout.rows * model.vocab_size
    work = 2.0 * weights.all * rollout.rows * job.target.num_chips
    return copies + cache + logits, work, _sent_once(job, weights)


def _sent_once(job: _Job, weights: _Weights) -> dict[str, int]:
    """To gather all weights once, by axis."""
    return {"fsdp": round(_share(job) * _WIDTH * weights.all)} if job.target.num_chips > 1 else {}


def _share(job: _Job) -> float:
    """Of an array that a GPU of a group gathers or gives: all but its own part."""
    group = job.target.num_chips
    if job.section.sharding == "hybrid":
        group = min(_GPUS_OF_A_HOST, group)
    return (group - 1) / group


def _sent(job: _Job, weights: _Weights) -> dict[str, int]:
    """Of the last micro-batch of an update, by axis: gathers in bf16 and sums in fp32."""
    if job.target.num_chips == 1:
        return {}
    layers = weights.all - weights.outside
    # Whole weights stay between the passes with zero1 and zero2, and with zero1 since the first micro-batch.
    gathers = {"zero1": 0, "zero2": weights.all}.get(job.section.sharding, 2 * layers + weights.outside)
    sent = {"fsdp": round(_share(job) * (_WIDTH * gathers + 4 * weights.all))}
    hosts = job.target.num_chips // min(_GPUS_OF_A_HOST, job.target.num_chips)
    if job.section.sharding == "hybrid" and hosts > 1:
        sent["replica"] = round(2 * (hosts - 1) / hosts * 4 * weights.own)
    return sent


def _forward(job: _Job) -> float:
    return forward_flops(job.hf, job.config.batch.rows_per_microbatch, job.rows.length)


def _changes(loaded: LoadedConfig, fewest_rows: int) -> Iterator[Settings]:
    yield from less_memory(loaded, fewest_rows)
    section = _section(loaded)
    if fewest_rows > 1 and section.sharding != "zero3":
        yield {"backend.torch.sharding": "zero3"}
    if not section.offload_parameters:
        yield {"backend.torch.offload_parameters": True}


def _section(loaded: LoadedConfig) -> TorchSection:
    assert isinstance(loaded.engine, TorchSection)
    return loaded.engine
