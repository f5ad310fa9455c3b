"""The packed forward pass of the torch engine: equal to Hugging Face's own pass over each sequence alone.

Logits and gradients of every family and of every switch a family has, blindness between packed sequences and to
padding, models that are refused, and what `recompute` recomputes.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import ConfigError
from common.data.batching import TrainSequence
from safework_torch.attention import Packing
from safework_torch.model import head, hidden_states, load_model, prepare_layers
from tests.training import COMPILER, packed, random_sequences, response_places

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# name: (model type, what differs from SIZES and the family's defaults)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 12}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-tied-sliding": ("qwen2", {"tie_word_embeddings": True, **SLIDING}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen3-sliding-biased": ("qwen3", {"head_dim": 16, "attention_bias": True, **SLIDING}),
}
SEQUENCES = random_sequences(8, SIZES["vocab_size"])
ROW_TOKENS = 32
PACKINGS = ({"packed": False}, {"share_prompts": False}, {"share_prompts": True})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder per model; every parameter is random, biases and norms too."""
    made = {}
    for seed, (name, (model_type, different)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **different})
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def reference_model(folder: Path) -> Any:
    """Hugging Face's own model with its plainest attention, and a gradient for every token's embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None
    return model


def packed_logits(model: Any, rows: int = 1, **changes: bool) -> list[torch.Tensor]:
    """Our logits [T V] of each sequence's response, out of packed rows; the last row is padding alone."""
    batch = packed(SEQUENCES, ROW_TOKENS, rows, **changes)
    fields = (batch.token_ids, batch.positions, batch.segment_ids, batch.prefix_ids)
    token_ids, *packing = (np.concatenate([array, np.zeros_like(array[:1])]) for array in fields)
    tensors = map(torch.from_numpy, (token_ids, packing[0]))
    logits = hidden_states(model, *tensors, Packing(*packing)) @ head(model).T
    assert torch.isfinite(logits).all()
    return [logits[row, batch.previous[row, places]] for row, places in response_places(batch, SEQUENCES)]


def alone(sequence: TrainSequence) -> tuple[torch.Tensor, slice]:
    """Token ids [1 T] of a prompt with its response, and where the response's logits are."""
    whole = np.concatenate([sequence.prompt, sequence.token_ids])
    return torch.from_numpy(whole).long()[None], slice(len(sequence.prompt) - 1, len(whole) - 1)


def reference_logits(reference: Any) -> list[torch.Tensor]:
    """Hugging Face's logits [T V] of each sequence's response, one unpacked sequence at a time."""
    return [reference(token_ids).logits[0, places] for token_ids, places in map(alone, SEQUENCES)]


def gradients(model: Any, logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of a loss that weighs every logit differently."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack([(torch.randn(x.shape, generator=generator) * x.tanh()).sum() for x in logits]).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= limit * gradient.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_and_gradients_equal_hugging_face(name: str, folders: dict[str, Path]) -> None:
    model, reference = load_model(folders[name], CPU), reference_model(folders[name])
    theirs = reference_logits(reference)
    assert torch.cat(theirs).std() > 0.5
    expected = gradients(reference, theirs)
    for packing in PACKINGS:
        ours = packed_logits(model, **packing)
        for ours_alone, theirs_alone in zip(ours, theirs, strict=True):
            assert (ours_alone - theirs_alone).abs().max() < 1e-4
        assert_equal_gradients(gradients(model, ours), expected, 1e-4)


def test_packings_are_what_they_are_called() -> None:
    """Otherwise the test above compares one packing with itself."""
    alone, whole, shared = (packed(SEQUENCES, ROW_TOKENS, **packing) for packing in PACKINGS)
    assert len(alone.token_ids) == len(SEQUENCES) > len(whole.token_ids) > len(shared.token_ids)
    assert (shared.prefix_ids != shared.segment_ids).any()
    assert all((batch.segment_ids == batch.prefix_ids).all() for batch in (alone, whole))


def test_rows_of_padding_change_nothing(folders: dict[str, Path]) -> None:
    model = load_model(folders["qwen3"], CPU)
    without, with_padding = packed_logits(model), packed_logits(model, rows=7)
    torch.testing.assert_close(with_padding, without, atol=1e-5, rtol=0)
    assert_equal_gradients(gradients(model, with_padding), gradients(model, without), 1e-6)


def test_sliding_window_is_really_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """Through a shared prompt as well, though it may stand far away in the row."""
    name = "qwen2-tied-sliding"
    settings = json.loads((folders[name] / "config.json").read_text())
    settings |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(folders[name] / "model.safetensors")
    slid, full = (packed_logits(load_model(folder, CPU)) for folder in (folders[name], tmp_path))
    for sequence, ours, unlimited in zip(SEQUENCES, slid, full, strict=True):
        inside = max(0, SLIDING["sliding_window"] - len(sequence.prompt) + 1)
        torch.testing.assert_close(ours[:inside], unlimited[:inside], atol=1e-5, rtol=0)
        assert (ours - unlimited).abs()[inside:].amax(dim=1).gt(0.01).all()


def test_padding_token_gets_its_gradient(folders: dict[str, Path]) -> None:
    model = load_model(folders["llama"], CPU)
    token_ids = torch.tensor([[3, SIZES["pad_token_id"], 5]])
    positions, ones = np.arange(3)[None], np.ones((1, 3), np.int32)
    packing = Packing(positions, ones, ones)
    hidden_states(model, token_ids, torch.from_numpy(positions), packing).square().sum().backward()
    embedding = model.get_input_embeddings().weight.grad
    assert set(embedding.abs().sum(dim=1).nonzero()[:, 0].tolist()) == {3, 5, SIZES["pad_token_id"]}


def test_weights_are_fp32_and_in_training_mode(folders: dict[str, Path], tmp_path: Path) -> None:
    reference_model(folders["qwen3"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


def test_folders_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((folders["llama"] / "config.json").read_text())
    tensors = load_file(folders["llama"] / "model.safetensors")
    # transformers would make up what is missing.
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, tmp_path / "model.safetensors")
    for change, words in (
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
        ({}, r"1 missing: .*up_proj\.weight"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ConfigError, match=words):
            load_model(tmp_path, CPU)


class CountedOperations(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def recomputed_gradients(folder: Path, mode: str) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients under a recompute mode, and how often each operation ran."""
    model = load_model(folder, CPU)
    prepare_layers(model, mode, compiled=False)
    with CountedOperations() as operations:
        found = gradients(model, packed_logits(model))
    return found, operations.counts


def test_recompute_changes_what_is_computed_twice_and_not_the_gradients(folders: dict[str, Path]) -> None:
    plain, counts = recomputed_gradients(folders["llama"], "none")
    layers, products = SIZES["num_hidden_layers"], counts["mm"] + counts["bmm"]
    assert counts["silu"] == layers
    # Of a layer's seven products, `full` repeats six: nothing needs the output of the last one.
    for mode, more_products in (("dots", 0), ("full", 6 * layers)):
        again, counts = recomputed_gradients(folders["llama"], mode)
        assert counts["silu"] == 2 * layers
        assert counts["mm"] + counts["bmm"] == products + more_products
        assert_equal_gradients(again, plain, 1e-6)


def test_full_recompute_of_compiled_layers_keeps_their_inputs_and_changes_no_gradient(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=COMPILER))
    plain = load_model(folders["llama"], CPU)
    exact = gradients(plain, packed_logits(plain))
    kept = {}
    for mode in ("none", "full"):
        model = load_model(folders["llama"], CPU)
        prepare_layers(model, mode, compiled=True)
        found, kept[mode] = kept_gradients(model)
        assert_equal_gradients(found, exact, 1e-5)
    assert kept["full"] < kept["none"] / 4


def kept_gradients(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and bytes that the forward pass keeps for the backward pass besides weights."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = packed_logits(model)
    return gradients(model, logits), sum(kept.values())
