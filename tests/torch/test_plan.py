"""Plans of training on GPUs that are not here: a layer against a count by hand, peaks against measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from common.config import ConfigError, load_config
from common.plan.report import PARTS, Plan
from common.plan.target import read_target
from safework_torch.compiled import Rows, layer_bytes
from safework_torch.main import open_plan
from tests.runs import safework
from tests.tiny import SIZES
from tests.training import write_run

QWEN = {
    **SIZES,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "head_dim": 8,
    "max_position_embeddings": 32768,
}
HALF_B = QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF_B |= {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
ONE_AND_A_HALF_B = QWEN | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
ONE_AND_A_HALF_B |= {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128}
SEVEN_B = QWEN | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
SEVEN_B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False}
SIX_TENTHS = QWEN | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
SIX_TENTHS |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
SIX_TENTHS |= {"num_attention_heads": 16, "num_key_value_heads": 8}
# Peaks of torch's allocator in GiB, from benchmarks/README.md: 64 sequences of 256 + 768 tokens in rows of 1,024.
MEASURED = [
    (HALF_B, "h100:1", "none", 32, 45.9),
    (HALF_B, "h100:1", "dots", 32, 39.3),
    (HALF_B, "h100:1", "full", 64, 13.7),
    (HALF_B, "h100:1", "full", 32, 12.1),
    (HALF_B, "h100:1", "full", 16, 10.4),
    (ONE_AND_A_HALF_B, "h100:1", "none", 16, 62.2),
]
SHARDED = [  # rows of both cards, tokens of each, GiB of a card
    (HALF_B, "zero2", "none", 64, 1024, 43.5),
    (HALF_B, "zero1", "none", 64, 1024, 43.2),
    (ONE_AND_A_HALF_B, "zero2", "none", 32, 1024, 52.7),
    (ONE_AND_A_HALF_B, "zero1", "none", 32, 1024, 53.6),
    (SEVEN_B, "zero1", "full", 2, 16384, 93.6),
]
PACKED = [(HALF_B, 4, 4096, 27.6), (SIX_TENTHS, 1, 16384, 33.9)]  # rows, tokens of each, GiB


def planned(
    folder: Path,
    shapes: dict[str, Any],
    target: str,
    parts: tuple[str, ...] = PARTS,
    batch: dict[str, Any] | None = None,
    **backend: Any,
) -> Plan:
    """A plan of a model whose folder holds a config.json and nothing else; `batch` and the rest are of sections."""
    batch = {"row_tokens": 1024, "rows_per_microbatch": backend.pop("rows", 16), "packed": False, **(batch or {})}
    section = {"sharding": backend.pop("sharding", "zero2"), "offload_parameters": backend.pop("on_host", False)}
    ema = {"decay": 0.99 if backend.pop("average", False) else None}
    frozen, loss = backend.pop("frozen", []), {"kl_type": "k3_loss", "kl_coef": 0.1} if backend.pop("kl", False) else {}
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shapes))
    run_file = write_run(
        folder,
        model,
        batch=batch,
        ema=ema,
        data={"max_prompt_tokens": 256},
        rollout={"max_new_tokens": backend.pop("response", 768), "rows": backend.pop("samples", 64)},
        model={"frozen": frozen},
        loss=loss,
        backend={"dtype": "bfloat16", "torch": {"compile": True, **section}, **backend},
    )
    return open_plan(load_config([run_file]), read_target(target, 1), parts)


@pytest.mark.parametrize(("shapes", "target", "recompute", "rows", "gib"), MEASURED)
def test_the_peak_is_what_gpus_measured(
    shapes: dict[str, Any], target: str, recompute: str, rows: int, gib: float, tmp_path: Path
) -> None:
    [update] = planned(tmp_path, shapes, target, ("update",), recompute=recompute, rows=rows).programs
    assert update.needed_bytes / 2**30 == pytest.approx(gib, rel=0.09)


@pytest.mark.parametrize(("shapes", "sharding", "recompute", "rows", "tokens", "gib"), SHARDED)
def test_the_peak_of_each_of_two_gpus_is_what_they_measured(
    shapes: dict[str, Any], sharding: str, recompute: str, rows: int, tokens: int, gib: float, tmp_path: Path
) -> None:
    backend = {"sharding": sharding, "recompute": recompute, "rows": rows, "response": tokens - 256}
    [update] = planned(tmp_path, shapes, "h200:2", ("update",), {"row_tokens": tokens}, **backend).programs
    assert update.needed_bytes / 2**30 == pytest.approx(gib, rel=0.09)


@pytest.mark.parametrize(("shapes", "rows", "tokens", "gib"), PACKED)
def test_the_peak_of_packed_rows_is_what_a_gpu_measured(
    shapes: dict[str, Any], rows: int, tokens: int, gib: float, tmp_path: Path
) -> None:
    batch = {"row_tokens": tokens, "rows_per_microbatch": rows, "packed": True}
    [update] = planned(tmp_path, shapes, "h100:1", ("update",), batch, recompute="none").programs
    assert update.needed_bytes / 2**30 == pytest.approx(gib, rel=0.09)


def test_what_a_compiled_layer_keeps_is_what_its_products_and_attention_read() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    model = AutoConfig.for_model("llama", **{**SIZES, **sizes})
    heads, keys = model.num_attention_heads * 16, model.num_key_value_heads * 16
    # Normed twice, output product, output; rotated queries, mixed values; keys and values; gate, up, their product.
    bf16 = 4 * 64 + 2 * heads + 2 * keys + 3 * 160
    fp32 = 2 + model.num_attention_heads  # the norms' roots and attention's normalisers
    found = layer_bytes(model, torch.bfloat16, Rows(4, 128), "none", compiled=True)
    by_hand = 4 * 128 * (2 * bf16 + 4 * fp32)
    assert found.kept == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_count_in_proportion_and_full_recompute_keeps_the_output_alone(compiled: bool) -> None:
    model = AutoConfig.for_model(**{**SIZES, "model_type": "llama"})
    one, two = (layer_bytes(model, torch.bfloat16, Rows(n, 256), "none", compiled) for n in (1, 2))
    assert two.kept == pytest.approx(2 * one.kept, rel=0.01)
    full = layer_bytes(model, torch.bfloat16, Rows(2, 256), "full", compiled)
    assert full.kept == pytest.approx(2 * 256 * model.hidden_size * 2, rel=0.01)
    assert full.kept + full.backward > two.kept


@pytest.mark.parametrize(("sharding", "gathers", "sums"), [("zero2", 1, 1), ("zero1", 0, 1), ("zero3", 2, 1)])
def test_a_gpu_holds_its_shards_and_sends_what_its_mode_sends(
    sharding: str, gathers: int, sums: int, tmp_path: Path
) -> None:
    plan = planned(tmp_path, QWEN | {"num_hidden_layers": 2}, "h100:4", ("update",), sharding=sharding)
    width, mlp = QWEN["hidden_size"], QWEN["intermediate_size"]
    heads = QWEN["num_attention_heads"] * QWEN["head_dim"]
    keys = QWEN["num_key_value_heads"] * QWEN["head_dim"]
    layer = width * (2 * heads + 2 * keys + 3 * mlp + 2) + heads + 2 * keys
    outside = QWEN["vocab_size"] * width + width
    everything = 2 * layer + outside
    assert plan.kinds["parameters, fp32"] == pytest.approx(everything, rel=0.01)  # four bytes, a quarter of them
    assert plan.kinds["moments"] == 2 * plan.kinds["parameters, fp32"]
    gathered = 2 * (gathers * 2 * layer + min(gathers, 1) * outside)
    assert plan.programs[0].collective_bytes["fsdp"] == pytest.approx(
        0.75 * (gathered + sums * 4 * everything), rel=0.01
    )


def test_frozen_weights_have_no_moments_and_no_gradients(tmp_path: Path) -> None:
    plans = []
    for name, frozen in (("all", []), ("some", ["model.layers.*"])):
        (tmp_path / name).mkdir()
        plans.append(planned(tmp_path / name, HALF_B, "h100:1", ("update",), recompute="full", frozen=frozen))
    whole, some = plans
    outside = QWEN["vocab_size"] * HALF_B["hidden_size"] + HALF_B["hidden_size"]
    assert some.kinds == whole.kinds | {"moments": 8 * outside}
    gradients = [plan.programs[0].temporary_bytes for plan in plans]
    assert gradients[0] - gradients[1] == whole.kinds["parameters, fp32"] - 4 * outside
    assert "with model.frozen it is less" in some.notes[1] and len(whole.notes) == 1


def test_offloaded_moments_are_not_on_the_gpu(tmp_path: Path) -> None:
    plans = []
    for name, offload in (("device", False), ("host", True)):
        (tmp_path / name).mkdir()
        plans.append(planned(tmp_path / name, HALF_B, "h100:1", ("update",), offload_optimizer=offload))
    device, host = plans
    assert host.kinds == device.kinds | {"moments": 0}
    assert device.programs[0].needed_bytes - host.programs[0].needed_bytes == device.kinds["moments"]


@pytest.mark.parametrize("target", ["h100:1", "h100:2"])
def test_offloaded_parameters_rest_on_the_host_with_gradients_and_average(target: str, tmp_path: Path) -> None:
    plans = []
    for name, on_host in (("device", False), ("host", True)):
        (tmp_path / name).mkdir()
        plans.append(planned(tmp_path / name, HALF_B, target, ("update",), on_host=on_host, average=True))
    device, host = plans
    masters = device.kinds["parameters, fp32"]
    assert host.kinds == device.kinds | {"parameters, fp32": 0, "average": 0}
    assert device.programs[0].needed_bytes - host.programs[0].needed_bytes == 3 * masters  # and the gradients


def test_an_offloaded_reference_is_on_the_gpu_for_its_logprobs_alone(tmp_path: Path) -> None:
    plans = []
    for name, rests in (("device", False), ("host", True)):
        (tmp_path / name).mkdir()
        plans.append(planned(tmp_path / name, HALF_B, "h100:1", kl=True, offload_reference=rests))
    device, host = plans
    reference = device.kinds["reference"]
    assert reference > 0 and host.kinds == {kind: size for kind, size in device.kinds.items() if kind != "reference"}
    less = [there.needed_bytes - here.needed_bytes for there, here in zip(device.programs, host.programs, strict=True)]
    assert less == [reference, 0, reference]


def test_what_does_not_fit_comes_with_a_change_that_does(tmp_path: Path) -> None:
    plan = planned(tmp_path, ONE_AND_A_HALF_B, "h100:1", ("update",), rows=64)
    assert not plan.fits
    assert plan.notes[0] == "It fits with batch.rows_per_microbatch=1: counted and checked."


def test_a_model_too_large_for_any_change_is_said_so(tmp_path: Path) -> None:
    large = ONE_AND_A_HALF_B | {"num_hidden_layers": 200, "intermediate_size": 71680}
    least = {"recompute": "full", "offload_optimizer": True, "on_host": True}
    plan = planned(tmp_path, large, "h100:1", ("update",), rows=1, **least)
    assert not plan.fits
    assert plan.notes[0] == "No smaller setting is left to try. It may need more chips, or larger ones."
    (tmp_path / "more").mkdir()
    notes = planned(tmp_path / "more", large, "h100:1", ("update",), rows=2, **least).notes
    said = "Nothing that was counted fits: batch.rows_per_microbatch=1. It may need more chips, or larger ones."
    assert notes[0] == said


def test_sampling_that_does_not_fit_comes_with_fewer_rows_and_then_the_rest(tmp_path: Path) -> None:
    plan = planned(tmp_path, HALF_B, "h100:1", ("update", "sampling"), samples=8192)
    assert plan.too_large == {"sampling"}
    assert plan.notes[0] == "It fits with rollout.rows=2048: counted and checked."
    (tmp_path / "both").mkdir()
    both = planned(tmp_path / "both", HALF_B, "h100:1", ("update", "sampling"), samples=8192, rows=512)
    assert both.too_large == {"update", "sampling"}
    assert both.notes[0] == "It fits with rollout.rows=2048 batch.rows_per_microbatch=1: counted and checked."


def test_changes_that_fit_only_together_come_without_needless_ones(tmp_path: Path) -> None:
    # Fewer rows are tried first and with the others, and prove needless.
    deep = ONE_AND_A_HALF_B | {"num_hidden_layers": 84}
    plan = planned(tmp_path, deep, "h100:1", ("update",), recompute="none")
    assert plan.notes[0] == "It fits with backend.recompute=full backend.offload_optimizer=true: counted and checked."
    (tmp_path / "sampled").mkdir()
    parts = ("update", "sampling")
    sampled = planned(tmp_path / "sampled", deep, "h100:1", parts, recompute="none", samples=8192)
    settings = "rollout.rows=512 backend.recompute=full backend.offload_optimizer=true"
    note = f"It fits with {settings} backend.torch.offload_parameters=true: counted and checked."
    assert sampled.notes[0] == note


def test_fewer_samples_that_do_not_help_are_not_proposed(tmp_path: Path) -> None:
    # Weights and moments leave sampling no room, however few its rows.
    deep = ONE_AND_A_HALF_B | {"num_hidden_layers": 112}
    plan = planned(tmp_path, deep, "h100:1", ("sampling",), samples=16)
    assert plan.too_large == {"sampling"}
    assert plan.notes[0] == "It fits with backend.offload_optimizer=true: counted and checked."


def test_the_command_plans_every_part_for_several_gpus(tmp_path: Path) -> None:
    planned(tmp_path, QWEN, "h100:2")
    done = safework("plan", tmp_path / "run.yaml", "--target", "h100:2")
    assert done.returncode == 0, done.stderr
    for words in ("2 chips of h100:2", "update", "logprobs", "sampling", "fsdp", "fits: "):
        assert words in done.stdout
    for empty in ("held besides", "predicted s", "compiled in s", "least", "ratio", "average"):
        assert empty not in done.stdout


def test_the_command_takes_overrides_behind_the_programs(tmp_path: Path) -> None:
    planned(tmp_path, QWEN, "h100:2")
    words = "plan", tmp_path / "run.yaml", "--target", "h100:2", "--only"
    done = safework(*words, "update", "batch.rows_per_microbatch=3")
    assert done.returncode == 1 and "batch.rows_per_microbatch = 3 (command line): does not divide" in done.stderr
    done = safework(*words, "update", "sampler")
    assert done.stderr == "error: --only sampler: is no program of a plan. Choose among update, logprobs, sampling.\n"


def test_packed_rows_are_counted_without_prompts(tmp_path: Path) -> None:
    needed = []
    for packed in (False, True):
        folder = tmp_path / str(packed)
        folder.mkdir()
        batch = {"packed": packed}
        [update] = planned(folder, HALF_B, "h100:1", ("update",), batch, recompute="none").programs
        needed.append(update.needed_bytes)
    prompts = 16 * 256  # tokens more that may be sampled: their logits, hidden states and gradients of these
    assert needed[1] - needed[0] == prompts * 2 * (151936 + 2 * 896)


def test_what_is_not_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend\.dtype.*GPUs are planned for in bfloat16 alone"):
        planned(tmp_path, QWEN, "h100:1", dtype="float32")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ConfigError, match=r"rows_per_microbatch = 3 \(.*run.yaml:\d+\): does not divide over the 2 GPUs of h100:2"
    ):
        planned(tmp_path / "other", QWEN, "h100:2", rows=3)
    (tmp_path / "twelve").mkdir()
    with pytest.raises(ConfigError, match=r"--target h100:12: hosts have 8 GPUs"):
        planned(tmp_path / "twelve", QWEN, "h100:12", rows=12, sharding="hybrid")
    (tmp_path / "classifier").mkdir()
    with pytest.raises(ConfigError, match=r"model\.path.*has a classification head and cannot write"):
        planned(tmp_path / "classifier", QWEN | {"architectures": ["Qwen2ForSequenceClassification"]}, "h100:1")
