"""`safework plan`: the trainer's own programs, compiled by the TPU's compiler for chips that are not here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import sharding as placing

from common.config import ConfigError, LoadedConfig, RunConfig
from common.plan.model import forward_flops, frozen_notes, planned_model
from common.plan.remedy import Settings, less_memory, with_remedy
from common.plan.report import Plan, ProgramPlan, progress
from common.plan.target import Target
from common.trainer import Sampling
from safework_jax import optimizer, programs, sampling
from safework_jax.attention import KeyValues
from safework_jax.compiled import CompiledText, chips, wanted_bytes
from safework_jax.config import JaxSection, MeshSection
from safework_jax.models.decoder.text import DecoderConfig, Params, init_params
from safework_jax.sharding import AXES, ROWS, mesh_over, parameter_path, parameter_sharding, resting

_ROW_ARRAYS = {
    **dict.fromkeys(("token_ids", "positions", "segment_ids", "prefix_ids", "previous"), jnp.int32),
    **dict.fromkeys(("sampling_logprobs", "advantages", "policy_weights", "kl_weights", "old_logprobs"), jnp.float32),
    "sampled": jnp.bool_,
}


class _Job(NamedTuple):
    """What is planned: a config, its model, the chips, and which programs."""

    config: RunConfig
    mesh: MeshSection
    hf: dict[str, Any]
    model: DecoderConfig
    devices: list[Any]
    target: Target
    parts: tuple[str, ...]


def plan(loaded: LoadedConfig, target: Target, parts: tuple[str, ...]) -> Plan:
    """Compile a config's programs for a target and read what they need; where that is too much, try smaller changes.

    Needs the model's config.json alone. Raises ConfigError for a mesh that is not as large as the target, and where the
    compiler is not installed or refuses a program.
    """
    mesh = _mesh(loaded)
    if mesh.num_devices != target.num_chips:
        sizes = " x ".join(map(str, mesh.shape))
        raise ConfigError(
            f"backend.jax.mesh: replica x fsdp x context x tensor = {sizes}: {target.slices} x {target.name} has "
            f"{target.num_chips} chips. Choose sizes whose product is that, for example backend.jax.mesh='{{replica: "
            f"{target.slices}, fsdp: {target.num_chips // target.slices}, tensor: 1}}'."
        )
    hf = planned_model(loaded)
    model, devices = DecoderConfig.from_hf(hf), chips(target)

    def compiled(changed: LoadedConfig, some: tuple[str, ...]) -> Plan:
        return _compiled(_Job(changed.config, _mesh(changed), hf, model, devices, target, some))

    def changes(changed: LoadedConfig) -> Iterator[Settings]:
        return _changes(changed, target, model.num_kv_heads)

    return with_remedy(loaded, parts, compiled, changes, "compiled")


def _compiled(job: _Job) -> Plan:
    """Every program of the job, compiled, and what lies on a chip all the time."""
    mesh = mesh_over(job.devices, job.mesh)
    program = programs.program_for(job.config, job.model, mesh)
    params = _params(job.model, mesh)
    weights, trained = _bytes(params), _bytes(program.frozen.trained(params))
    batch = _bytes(_rows(job.config, mesh))
    kinds = {
        "parameters": weights,
        "moments": _moments(job, trained),
        "gradients": trained,
        "rows of a micro-batch": batch,
    }
    reference = weights // 4 * program.dtype.itemsize if job.config.loss.kl_coef else 0
    arriving = reference if job.config.backend.offload_reference else 0
    if reference and not arriving:
        kinds["reference"] = reference
    if job.config.ema.decay is not None:
        kinds["average"] = weights
    besides = kinds.get("reference", 0) + kinds.get("average", 0)
    found, notes = [], frozen_notes(job.config)
    for name, own, work, compile_program in _lowered(job, program, params, mesh):
        held = own + besides + (arriving if name == "logprobs" else 0)
        progress(f"compiling {name}")
        begun = time.monotonic()
        try:
            compiled = compile_program()
        except jax.errors.JaxRuntimeError as error:
            found.append(ProgramPlan(name, 0, wanted_bytes(name, error), held, 0.0, {}, {}, 0.0, 0.0, 0.0))
            notes += (f"The compiler refuses {name!r}; what it says it needs stands among temporaries.",)
        else:
            seconds = time.monotonic() - begun
            found.append(_read(job, name, held, work / job.target.num_chips, compiled, seconds))
    return Plan(job.target, kinds, tuple(found), notes)


def _read(job: _Job, name: str, held: int, work: float, compiled: Any, seconds: float) -> ProgramPlan:
    """What a compiled program needs of a chip, of which it takes so much work in FLOP and found `held` bytes taken."""
    memory = compiled.memory_analysis()
    text = CompiledText(compiled.as_text(), tuple(zip(AXES, job.mesh.shape, strict=True)))
    return ProgramPlan(
        name,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        held,
        work,
        text.sent_by_axis(),
        _least_bytes(job, name),
        text.cycles / job.target.chip.hertz,
        work / job.target.chip.bf16_flops,
        seconds,
    )


def _moments(job: _Job, trained: int) -> int:
    """Bytes of a chip for the moments of so many bytes of parameters."""
    return 0 if job.config.backend.offload_optimizer else 2 * trained


def _lowered(
    job: _Job, program: programs.Program, params: Params, mesh: placing.Mesh
) -> Iterator[tuple[str, int, float, Callable[[], Any]]]:
    """(name, bytes held besides its arguments, flops, compile) of each program that is asked for."""
    trained = program.frozen.trained(params)
    moments_held = _moments(job, _bytes(trained))
    config, rows = job.config, _rows(job.config, mesh)
    forward = forward_flops(job.hf, config.batch.rows_per_microbatch, config.batch.row_tokens)
    again = {"none": 0, "dots": 0, "full": 1}[program.recompute]
    if "update" in job.parts:
        accumulate = programs.accumulate.lower(params, trained, rows, program)
        yield "update: a micro-batch", moments_held, (3 + again) * forward, accumulate.compile
        count: Any = _shape((), jnp.int32, mesh)
        offload = config.backend.offload_optimizer
        moment = jax.tree.map(lambda leaf: leaf.update(sharding=resting(leaf.sharding, offload=offload)), trained)
        moments = optax.ScaleByAdamState(count, moment, moment)
        number = _shape((), jnp.float32, mesh)
        step = optimizer.lower_step(config.optimizer, trained, moments, trained, number, program.frozen)
        yield "update: AdamW", _bytes(params) - _bytes(trained), 0.0, step.compile
    if "logprobs" in job.parts:
        yield "logprobs", moments_held, forward, programs.logprobs.lower(params, rows, program).compile
    if "sampling" in job.parts:
        for name, besides, work, compiled in _sampling(job, program.decoding, params, mesh):
            yield name, moments_held + besides, work, compiled


def _sampling(
    job: _Job, decoding: sampling.Decoding, params: Params, mesh: placing.Mesh
) -> Iterator[tuple[str, int, float, Callable[[], Any]]]:
    """(name, bytes held besides its arguments, flops, compile) of the embedded sampler's programs: the prompts of
    `rollout.rows` responses, one layer's cache for each of these, and one token of each. The layers lie there twice, in
    a stack and apart.
    """
    rollout, model, layer = job.config.rollout, job.model, _one_layer(params["layers"], mesh)
    whole, stack = _bytes(params), _bytes(params["layers"])
    count = sampling.row_count(rollout.rows)
    num_prompts = 1 << (-(-rollout.rows // rollout.group_size) - 1).bit_length()
    slots = -(-job.config.data.max_prompt_tokens // sampling.PROMPT_STEP) * sampling.PROMPT_STEP
    prompts = _shape((num_prompts, slots), jnp.int32, mesh), _shape((num_prompts,), jnp.int32, mesh)
    reading = sampling.read_prompts.lower(params, *prompts, decoding)
    yield "sampling: prompts", stack, forward_flops(job.hf, num_prompts, slots), reading.compile
    one = _cache(job, decoding, (count, slots + rollout.max_new_tokens), mesh)
    read = _cache(job, decoding, (num_prompts, slots), mesh)
    spreading = sampling.spread.lower(
        jax.tree.map(partial(_stacked, count=model.num_layers), read),
        _shape((), jnp.int32, mesh),
        _shape((count,), jnp.int32, mesh),
        slots + rollout.max_new_tokens,
        decoding,
    )
    others = (model.num_layers - 1) * _bytes(one)
    yield "sampling: rows of a layer", whole + stack + others, 0.0, spreading.compile
    layers, cache = model.num_layers * (layer,), model.num_layers * (one,)
    rule = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, (), rollout.rows)
    chosen, positions, uniforms = (_shape((count,), dtype, mesh) for dtype in (jnp.int32, jnp.int32, jnp.float32))
    advance = sampling.advance.lower(
        params, layers, chosen, positions, cache, uniforms, decoding=decoding, sampling=rule
    )
    yield "sampling: a token", stack, forward_flops(job.hf, count, 1), advance.compile


def _cache(job: _Job, decoding: sampling.Decoding, shape: tuple[int, int], mesh: placing.Mesh) -> KeyValues:
    """Keys and values of so many rows and slots in one layer, as the sampler lays them out."""
    rows, slots = shape
    whole = (rows, job.model.num_kv_heads, slots, job.model.head_dim)
    spec = decoding.layout.rows_and_heads(whole) if mesh.size > 1 else placing.PartitionSpec()
    one: Any = jax.ShapeDtypeStruct(whole, decoding.dtype, sharding=placing.NamedSharding(mesh, spec))
    return KeyValues(one, one)


def _stacked(leaf: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """So many arrays as one, along a new first dimension."""
    assert isinstance(leaf.sharding, placing.NamedSharding)
    spec = placing.PartitionSpec(None, *leaf.sharding.spec)
    sharding = placing.NamedSharding(leaf.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=sharding)


def _changes(loaded: LoadedConfig, target: Target, num_kv_heads: int) -> Iterator[Settings]:
    mesh = _mesh(loaded)
    yield from less_memory(loaded, mesh.row_shares)
    if mesh.replica % (2 * target.slices) == 0:
        yield {"backend.jax.mesh.replica": mesh.replica // 2, "backend.jax.mesh.fsdp": mesh.fsdp * 2}
    if mesh.fsdp % 2 == 0 and num_kv_heads % (2 * mesh.tensor) == 0:
        split = {"backend.jax.mesh.fsdp": mesh.fsdp // 2, "backend.jax.mesh.tensor": mesh.tensor * 2}
        yield split | {"batch.rows_per_microbatch": mesh.row_shares // 2}


def _mesh(loaded: LoadedConfig) -> MeshSection:
    assert isinstance(loaded.engine, JaxSection)
    return loaded.engine.mesh


def _params(model: DecoderConfig, mesh: placing.Mesh) -> Params:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.float32))

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=parameter_sharding(parameter_path(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def _one_layer(layers: Any, mesh: placing.Mesh) -> Any:
    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert isinstance(leaf.sharding, placing.NamedSharding)
        sharding = placing.NamedSharding(mesh, placing.PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, layers)


def _rows(config: RunConfig, mesh: placing.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape, names = (config.batch.rows_per_microbatch, config.batch.row_tokens), dict(_ROW_ARRAYS)
    if config.loss.old_logprobs == "detach":
        del names["old_logprobs"]
    if config.loss.kl_coef:
        names["ref_logprobs"] = jnp.float32
    lying = placing.NamedSharding(mesh, ROWS)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=lying) for name, dtype in names.items()}


def _shape(shape: tuple[int, ...], dtype: Any, mesh: placing.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placing.NamedSharding(mesh, placing.PartitionSpec()))


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _least_bytes(job: _Job, name: str) -> dict[str, int]:
    """What a chip must send. fsdp gathers each weight of a layer once forward and once backward, the head once for both
    passes, and scatters their gradients once in fp32; of an embedding beside a head the rows of its tokens do, or all
    where that is less. replica sums the gradients that a chip keeps. tensor sums what attention and MLP give, once each
    forward and once each backward.
    """
    model, mesh = job.model, job.mesh
    backward = {"update: a micro-batch": True, "logprobs": False}.get(name)
    if backward is None:
        return {}
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.float32))
    sizes = {module: sum(leaf.size for leaf in jax.tree.leaves(tree)) // mesh.tensor for module, tree in shapes.items()}
    width = jnp.dtype(job.config.backend.dtype).itemsize
    hidden = job.config.batch.rows_per_microbatch // mesh.row_shares * job.config.batch.row_tokens * model.hidden_dim
    outside = min(sizes["embed"], hidden) + sizes["head"] if "head" in sizes else sizes["embed"]
    gathers, scatters = (2, 1) if backward else (1, 0)
    once = sizes["layers"] * (gathers * width + scatters * 4) + outside * (width + scatters * 4)
    fsdp = (mesh.fsdp - 1) / mesh.fsdp * once
    replica = scatters * 2 * (mesh.replica - 1) / mesh.replica * sum(sizes.values()) / mesh.fsdp * 4
    tensor = 2 * (mesh.tensor - 1) / mesh.tensor * hidden * width * 2 * model.num_layers * (1 + backward)
    return {axis: round(sent) for axis, sent in (("fsdp", fsdp), ("replica", replica), ("tensor", tensor)) if sent}
