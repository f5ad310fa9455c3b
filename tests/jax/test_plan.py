"""Plans of tiny models for four chips by the TPU's own compiler: two layers, real sharding, real collectives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from common.config import ConfigError, load_config
from common.plan.report import PARTS, Plan
from common.plan.target import Target, read_target
from safework_jax.compiled import CompiledText, chips
from safework_jax.config import MeshSection
from safework_jax.layout import layout_on
from safework_jax.main import open_plan
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.sharding import mesh_over
from tests.tiny import SIZES
from tests.training import write_run

TARGET = read_target("v5e:2x2", 1)
SHAPES = {**SIZES, "model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def planned(
    folder: Path,
    parts: tuple[str, ...],
    mesh: dict[str, int],
    rows: int,
    frozen: Sequence[str] = (),
    offload: bool = False,
    reference: str = "",
    target: Target = TARGET,
    samples: int = 64,
    **shapes: int,
) -> Plan:
    """A plan of a model whose folder holds a config.json and nothing else."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**SHAPES, **shapes}))
    backend = {"name": "jax", "dtype": "bfloat16", "recompute": "full", "threads": 0, "jax": {"mesh": mesh}}
    backend |= {"offload_optimizer": offload, "offload_reference": reference == "offloaded"}
    loss = {"kl_type": "k3_loss", "kl_coef": 0.1} if reference else {}
    batch = {"row_tokens": 256, "rows_per_microbatch": rows}
    rollout, trained = {"rows": samples}, {"frozen": list(frozen)}
    run_file = write_run(folder, model, backend=backend, batch=batch, loss=loss, model=trained, rollout=rollout)
    return open_plan(load_config([run_file]), target, parts)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """All programs of a model over 2 fsdp x 2 tensor chips."""
    folder = tmp_path_factory.mktemp("plan")
    return planned(folder, PARTS, {"fsdp": 2, "tensor": 2}, 2, hidden_size=256, intermediate_size=512)


def test_every_program_of_a_run_is_compiled_and_fits(plan: Plan) -> None:
    names = [program.name for program in plan.programs]
    assert names == [
        "update: a micro-batch",
        "update: AdamW",
        "logprobs",
        "sampling: prompts",
        "sampling: rows of a layer",
        "sampling: a token",
    ]
    assert plan.fits and plan.notes == ()
    for program in plan.programs:
        assert program.temporary_bytes >= 0 and program.predicted_s > 0 and program.compile_s > 0


def test_a_chip_holds_its_part_of_what_lies_there(plan: Plan) -> None:
    matrices = 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512) + 2 * 320 * 256
    vectors = 2 * (2 * 256 + 256 + 2 * 128) + 256  # norms and biases, whole on every chip
    assert plan.kinds["parameters"] == plan.kinds["gradients"] == 4 * (matrices // 4 + vectors)
    assert plan.kinds["moments"] == 2 * plan.kinds["parameters"]
    update = plan.programs[0]
    assert update.argument_bytes >= 2 * plan.kinds["parameters"]
    assert update.resident_bytes == plan.kinds["moments"]


def test_slices_sum_their_gradients(tmp_path: Path) -> None:
    mesh, sizes = {"replica": 2, "fsdp": 2, "tensor": 2}, {"hidden_size": 256, "intermediate_size": 512}
    update = planned(tmp_path, ("update",), mesh, 4, target=read_target("v5e:2x2", 2), **sizes).programs[0]
    assert update.collective_bytes["replica"] == pytest.approx(update.least_bytes["replica"], rel=0.1)


def test_what_hosts_exchange_in_an_unknown_way_is_said() -> None:
    sends = "ENTRY %main (x: f32[2]) -> f32[2] {\n  %s = (f32[2], u32[], token[]) send(%x, %t), "
    sends += 'frontend_attributes={_xla_megascale_transfer_type="GATHER"}\n}'
    with pytest.raises(ConfigError, match=r"--slices: .* hosts exchange GATHER, which a plan cannot count"):
        CompiledText(sends, [("replica", 2)]).sent_by_axis()


# As the compiler writes a sum that goes around a ring of devices, two steps a run; and a sum whose parts stay apart.
RING = """%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p = (u32[], f32[8]{0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %two = u32[] constant(2)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %z = f32[8]{0} collective-permute(%y), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %next = u32[] add(%i, %two), backend_config={"estimated_cycles":"10"}
  ROOT %t = (u32[], f32[8]{0}) tuple(%next, /*index=1*/%z)
}
%condition (q: (u32[], f32[8])) -> pred[] {
  %q = (u32[], f32[8]{0}) parameter(0)
  %end = u32[] constant(15)
  %c = u32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%c, %end), direction=LT
}
ENTRY %main (x: (u32[], f32[8])) -> f32[2] {
  %x = (u32[], f32[8]{0}) parameter(0)
  %loop = (u32[], f32[8]{0}) while(%x), condition=%condition, body=%body
  %whole = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %own = f32[2]{0} reduce-scatter(%whole), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}"""


def test_a_loop_runs_as_often_as_its_counter_steps_to_its_end() -> None:
    text = CompiledText(RING, [("fsdp", 4)])
    around, apart = 8 * 2 * 8 * 4, 3 * 2 * 4
    assert text.sent_by_axis() == {"fsdp": around + apart}
    assert text.cycles == 8 * 10


@pytest.mark.parametrize(
    ("was", "by"),
    [("direction=LT", "direction=NE"), ("u32[] constant(15)", "u32[] iota()"), ("add(%i, %two)", "add(%i, %i)")],
)
def test_a_loop_that_cannot_be_counted_is_said(was: str, by: str) -> None:
    assert was in RING
    with pytest.raises(ConfigError, match=r"a loop whose runs a plan cannot count: ROOT %less"):
        CompiledText(RING.replace(was, by), [("fsdp", 4)]).sent_by_axis()


def test_frozen_parameters_have_no_moments_and_no_gradients(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    plan = planned(tmp_path, ("update",), {"fsdp": 2, "tensor": 2}, 2, ["*.mlp.*"], **sizes)
    frozen = 4 * 2 * 3 * 256 * 512 // 4  # bytes of a chip
    assert plan.kinds["gradients"] == plan.kinds["parameters"] - frozen
    assert plan.kinds["moments"] == 2 * plan.kinds["gradients"]
    update, step = plan.programs
    assert update.argument_bytes < 2 * plan.kinds["parameters"]
    assert (update.resident_bytes, step.resident_bytes) == (plan.kinds["moments"], frozen)
    assert step.argument_bytes == pytest.approx(4 * plan.kinds["gradients"], rel=0.01)
    assert "with model.frozen it is less" in plan.notes[0]


def test_offloaded_moments_are_not_on_the_chip(plan: Plan, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    found = planned(tmp_path, ("update",), {"fsdp": 2, "tensor": 2}, 2, offload=True, **sizes)
    assert found.kinds == plan.kinds | {"moments": 0}
    update, step = found.programs
    assert update.resident_bytes == 0
    assert step.argument_bytes == pytest.approx(2 * plan.kinds["parameters"], rel=0.01)


def test_an_offloaded_reference_is_on_the_chip_for_its_logprobs_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    found = []
    for reference in ("kept", "offloaded"):
        (tmp_path / reference).mkdir()
        parts, mesh = ("update", "logprobs"), {"fsdp": 2, "tensor": 2}
        found.append(planned(tmp_path / reference, parts, mesh, 2, reference=reference, **sizes))
    kept, offloaded = found
    size = kept.kinds["reference"]
    assert size == kept.kinds["parameters"] / 2 and kept.kinds == offloaded.kinds | {"reference": size}
    less = [on.needed_bytes - off.needed_bytes for on, off in zip(kept.programs, offloaded.programs, strict=True)]
    assert less == [size, size, 0]


def test_weights_travel_once_forward_and_once_backward_and_gradients_once(plan: Plan) -> None:
    update, _, logprobs, *_ = plan.programs
    for program in (update, logprobs):
        sent, least = program.collective_bytes["fsdp"], program.least_bytes["fsdp"]
        assert 0.98 * least < sent < 1.03 * least
        assert 0.9 * program.least_bytes["tensor"] < program.collective_bytes["tensor"]
    assert set(update.collective_bytes) <= {"fsdp", "tensor", "fsdp+tensor"}


@pytest.mark.parametrize(
    ("intermediate_size", "offload", "said"),
    [
        (53248, False, "It fits with backend.offload_optimizer=true: compiled and checked."),
        (110592, True, "It fits with backend.jax.mesh.replica=2 backend.jax.mesh.fsdp=2: compiled and checked."),
        # Split once it is still too large.
        (163840, True, "It fits with backend.jax.mesh.replica=1 backend.jax.mesh.fsdp=4: compiled and checked."),
    ],
)
def test_what_does_not_fit_comes_with_the_smallest_change_that_does(
    intermediate_size: int, offload: bool, said: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": intermediate_size, "head_dim": 128}
    found = planned(tmp_path, ("logprobs",), {"replica": 4}, 4, offload=offload, **sizes)
    assert not found.fits and found.notes[0] == said
    if intermediate_size == 163840:  # more than the chip has
        assert found.programs[0].temporary_bytes > 16 * 2**30
        assert found.notes[1].startswith("The compiler refuses 'logprobs'")


def test_a_split_that_the_model_refuses_does_not_end_the_search(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 2**20, "head_dim": 128, "vocab_size": 321}
    found = planned(tmp_path, ("logprobs",), {"fsdp": 4}, 4, offload=True, **sizes)
    split = "backend.jax.mesh.fsdp=2 backend.jax.mesh.tensor=2 batch.rows_per_microbatch=2"
    assert found.notes[0].startswith(f"Nothing that was compiled fits: {split}. It may need more chips")


def test_sampling_that_does_not_fit_comes_with_fewer_rows(tmp_path: Path) -> None:
    found = planned(tmp_path, ("sampling",), {"fsdp": 4}, 4, samples=2**20, hidden_size=256)
    assert found.too_large == {"sampling"}
    assert found.notes[0] == "It fits with rollout.rows=65536: compiled and checked."


def test_a_mesh_of_another_size_is_refused(tmp_path: Path) -> None:
    said = r"= 1 x 2 x 1 x 1: 1 x v5e:2x2 has 4 chips\. .*mesh='{replica: 1, fsdp: 4, tensor: 1}'\."
    with pytest.raises(ConfigError, match=said):
        planned(tmp_path, PARTS, {"fsdp": 2}, 2)


def test_the_platform_and_the_rows_choose_the_attention() -> None:
    mesh, model = mesh_over(chips(TARGET), MeshSection(fsdp=2, tensor=2)), DecoderConfig.from_hf(SHAPES)
    assert layout_on(mesh, model, jnp.bfloat16, share_prompts=False).kernel == "splash"
    assert layout_on(mesh, model, jnp.bfloat16, share_prompts=True).kernel == "masked"
    windows = model.__class__(**{**vars(model), "windows": (8, 8)})
    assert layout_on(mesh, windows, jnp.bfloat16, share_prompts=False).kernel == "masked"
    four = mesh_over(chips(TARGET), MeshSection(tensor=4))
    with pytest.raises(ConfigError, match="tensor = 4: does not divide the model's 2 key heads"):
        layout_on(four, model, jnp.bfloat16, share_prompts=False)
