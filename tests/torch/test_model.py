"""The packed forward pass of the torch engine: equal to Hugging Face's own pass over each sequence alone.

Logits and gradients of every family and of every switch a family has, blindness between packed sequences and to
padding, models that are refused, and what `recompute` recomputes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import ConfigError
from safework_torch.model import head, hidden_states, load_model, recompute

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
LENGTHS = (9, 14, 4, 17, 11)
ROWS = ((0, 1, 2), (3, 4), ())  # the last row is padding alone
ROW_TOKENS = 32


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


def sequences() -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, SIZES["vocab_size"], length)) for length in LENGTHS]


def packed_rows(rows: tuple[tuple[int, ...], ...] = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and segment ids [B T] of the sequences, one after the other, padding behind them."""
    token_ids, segment_ids = (torch.zeros((len(rows), ROW_TOKENS), dtype=torch.int64) for _ in range(2))
    positions = torch.arange(ROW_TOKENS).tile(len(rows), 1)
    for row, start, sequence, segment in _places(rows):
        place = (row, slice(start, start + len(sequence)))
        token_ids[place], segment_ids[place], positions[place] = sequence, segment, torch.arange(len(sequence))
    return token_ids, positions, segment_ids


def _places(rows: tuple[tuple[int, ...], ...]) -> list[tuple[int, int, torch.Tensor, int]]:
    """(row, start, sequence, segment id) of each sequence."""
    places = []
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, start=1):
            places.append((row, start, sequences()[member], segment))
            start += LENGTHS[member]
    return places


def packed_logits(model: Any, rows: tuple[tuple[int, ...], ...] = ROWS) -> list[torch.Tensor]:
    """Our logits [T V] of each sequence, cut out of packed rows."""
    logits = hidden_states(model, *packed_rows(rows)) @ head(model).T
    assert torch.isfinite(logits).all()
    return [logits[row, start : start + len(sequence)] for row, start, sequence, _ in _places(rows)]


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
    ours = packed_logits(model)
    theirs = [reference(sequence[None]).logits[0] for sequence in sequences()]
    assert torch.cat(theirs).std() > 0.5
    for ours_alone, theirs_alone in zip(ours, theirs, strict=True):
        assert (ours_alone - theirs_alone).abs().max() < 1e-4
    assert_equal_gradients(gradients(model, ours), gradients(reference, theirs), 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-sliding"])
def test_neighbours_and_padding_change_nothing(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name], CPU)
    for rows in (((0,), (1,), (2,), (3,), (4,)), ((2, 1, 0), (), (4, 3))):
        order = [member for members in rows for member in members]
        moved = dict(zip(order, packed_logits(model, rows), strict=True))
        for member, logits in enumerate(packed_logits(model)):
            torch.testing.assert_close(moved[member], logits, atol=1e-5, rtol=0)


def test_rows_of_padding_add_no_gradient(folders: dict[str, Path]) -> None:
    model = load_model(folders["qwen3"], CPU)
    without = gradients(model, packed_logits(model, ROWS[:2]))
    assert_equal_gradients(gradients(model, packed_logits(model, (*ROWS, (), ()))), without, 1e-6)


def test_sliding_window_is_really_there(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "qwen2-tied-sliding"
    settings = json.loads((folders[name] / "config.json").read_text())
    settings |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(folders[name] / "model.safetensors")
    slid, full = (packed_logits(load_model(folder, CPU))[3] for folder in (folders[name], tmp_path))
    torch.testing.assert_close(slid[:5], full[:5], atol=1e-5, rtol=0)
    assert (slid[6:] - full[6:]).abs().max() > 0.05


def test_padding_token_gets_its_gradient(folders: dict[str, Path]) -> None:
    model = load_model(folders["llama"], CPU)
    token_ids = torch.tensor([[3, SIZES["pad_token_id"], 5]])
    ones = torch.ones_like(token_ids)
    hidden_states(model, token_ids, torch.arange(3)[None], ones).square().sum().backward()
    embedding = model.get_input_embeddings().weight.grad
    assert set(embedding.abs().sum(dim=1).nonzero()[:, 0].tolist()) == {3, 5, SIZES["pad_token_id"]}


def test_weights_are_fp32_and_in_training_mode(folders: dict[str, Path], tmp_path: Path) -> None:
    reference_model(folders["qwen3"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported\. Supported: llama, qwen2, qwen3"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1 in config\.json.*Set it to 0"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised weights cannot be trained"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(
    change: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ConfigError, match=words) as error:
        load_model(tmp_path, CPU)
    assert str(tmp_path) in str(error.value)


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
    recompute(model, mode)
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
