"""The JAX decoder against transformers, against itself packed, cached and recomputed, and its folders in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from common.export import export_model
from common.state_files import write_state
from safework_jax.checkpoint import snapshot
from safework_jax.frozen import Frozen
from safework_jax.model import load_model
from safework_jax.models.decoder import text
from safework_jax.models.decoder.cache import decode, expand_layer, prefill, unstack_layers
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.text import head_weight, hidden_states, init_params
from safework_jax.optimizer import init_moments

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# name: (model type, what differs from SIZES and the family's defaults)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 12}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-tied-sliding": ("qwen2", {"tie_word_embeddings": True, **SLIDING}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen3-tied-sliding-biased": (
        "qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, **SLIDING},
    ),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder per model; every parameter is random, biases and norms too."""
    made = {}
    for seed, (name, (model_type, different)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **{**SIZES, **different})
        )
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def reference_logits(folder: Path, token_ids: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(token_ids)).logits.float().numpy()


run = jax.jit(hidden_states, static_argnames=("config", "remat", "compute_dtype"))


def hidden(config: DecoderConfig, params: Any, token_ids: Any, positions: Any = None, segment_ids: Any = None) -> Any:
    """fp32 hidden states; one unpacked sequence a row unless told otherwise."""
    if positions is None:
        positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
    if segment_ids is None:
        segment_ids = np.ones(token_ids.shape, np.int32)
    return run(config, params, token_ids, positions, segment_ids, segment_ids, remat="none", compute_dtype=jnp.float32)


def logits(config: DecoderConfig, params: Any, token_ids: Any) -> np.ndarray:
    return np.asarray(hidden(config, params, token_ids) @ head_weight(config, params).T)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, folders: dict[str, Path]) -> None:
    token_ids = tokens(2, 40)
    config, params = load_model(folders[name], jnp.float32)
    ours, theirs = logits(config, params, token_ids), reference_logits(folders[name], token_ids)
    assert theirs.std() > 0.5
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "qwen2-tied-sliding"])
def test_packed_sequences_do_not_see_each_other(name: str, folders: dict[str, Path]) -> None:
    config, params = load_model(folders[name], jnp.float32)
    sequences = [tokens(9), tokens(14)[::-1], tokens(4)]
    shape = (1 + len(sequences), 32)
    token_ids, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    start, places = 0, []
    for row, sequence in enumerate(sequences, 1):
        # All in row 0 one after the other, and each in a row of its own; what is left of a row is padding.
        places.append((row, start, len(sequence)))
        for at, where in ((0, slice(start, start + len(sequence))), (row, slice(len(sequence)))):
            token_ids[at, where], positions[at, where] = sequence, np.arange(len(sequence))
            segment_ids[at, where] = row
        start += len(sequence)
    x = np.asarray(hidden(config, params, token_ids, positions, segment_ids))
    assert np.isfinite(x).all()
    for row, start, length in places:
        np.testing.assert_allclose(x[0, start : start + length], x[row, :length], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-tied-sliding-biased", "qwen2-yarn"])
def test_prefill_and_decode_equal_the_whole_forward_pass(name: str, folders: dict[str, Path]) -> None:
    config, params = load_model(folders[name], jnp.float32)
    lengths, prompt_index, num_new = np.array([3, 9, 6]), np.array([0, 0, 1, 2, 2, 2]), 7
    prompts, new = tokens(3, 9), tokens(7, num_new)[1:]
    start = jax.jit(prefill, static_argnames=("config", "compute_dtype"))
    last, prompt_cache = start(config, params, prompts, lengths, compute_dtype=jnp.float32)
    rows_of = jnp.asarray(prompt_index)
    cache = tuple(expand_layer(prompt_cache, layer, rows_of, 9 + num_new) for layer in range(config.num_layers))
    layers = unstack_layers(params)
    step = jax.jit(decode, static_argnames="config", donate_argnames="cache")
    decoded = []
    for i in range(num_new):
        row_hidden, cache = step(config, params, layers, new[:, i], lengths[prompt_index] + i, cache)
        decoded.append(np.asarray(row_hidden))
    rows = np.zeros((6, 9 + num_new), np.int32)
    for row, prompt in enumerate(prompt_index):
        rows[row, : lengths[prompt] + num_new] = np.concatenate([prompts[prompt, : lengths[prompt]], new[row]])
    whole = np.asarray(hidden(config, params, rows))
    for row, prompt in enumerate(prompt_index):
        length = lengths[prompt]
        np.testing.assert_allclose(last[prompt], whole[row, length - 1], atol=1e-5)
        np.testing.assert_allclose(np.stack(decoded)[:, row], whole[row, length : length + num_new], atol=1e-5)


def test_every_remat_gives_the_same_gradients(folders: dict[str, Path]) -> None:
    config, params = load_model(folders["llama"], jnp.float32)
    token_ids = tokens(2, 16)
    ones = np.ones_like(token_ids)
    arrays = (token_ids, np.broadcast_to(np.arange(16), (2, 16)), ones, ones)

    def gradients(remat: text.Remat) -> Any:
        def loss(params: Any) -> jax.Array:
            x = hidden_states(config, params, *map(jnp.asarray, arrays), remat=remat, compute_dtype=jnp.float32)
            return jnp.mean(jax.nn.log_softmax(x @ head_weight(config, params).T)[..., 0])

        return jax.jit(jax.grad(loss))(params)

    plain = gradients("none")
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain))
    for remat in ("dots", "full"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), plain, gradients(remat))


def test_what_each_remat_computes_again(folders: dict[str, Path]) -> None:
    config, params = load_model(folders["llama"], jnp.float32)
    arrays = [jnp.asarray(tokens(2, 16)), jnp.broadcast_to(jnp.arange(16), (2, 16)), *2 * [jnp.ones((2, 16), int)]]

    def products(remat: text.Remat) -> int:
        def loss(params: Any) -> jax.Array:
            return hidden_states(config, params, *arrays, remat=remat, compute_dtype=jnp.float32).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    forward, scores_and_mix, output_of_a_layer = 9, 2, 1
    assert products("none") == 3 * forward
    assert products("dots") == 3 * forward + scores_and_mix
    assert products("full") == 4 * forward - output_of_a_layer


def test_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    traced = []
    original = text.Block.__call__

    def counted(self: text.Block, x: Any, rotation: Any, attend: Any) -> Any:
        traced.append(x.shape)
        return original(self, x, rotation, attend)

    monkeypatch.setattr(text.Block, "__call__", counted)
    config, params = load_model(folders["llama"], jnp.float32)
    hidden(config, params, tokens(3, 8))
    hidden(DecoderConfig(**vars(config)), jax.tree.map(lambda x: x + 1, params), tokens(3, 8) // 2)
    assert traced == [(3, 8, 32)]


def test_a_layer_rounds_its_sum_once(folders: dict[str, Path]) -> None:
    config, params = load_model(folders["llama-tied-biased"], jnp.float32)
    layer = jax.tree.map(lambda stacked: jnp.zeros_like(stacked[0]), params["layers"])
    layer["attention"]["output"]["bias"] += 0.5
    layer["mlp"]["down"]["bias"] += 0.75
    block = nnx.merge(nnx.split(text.bind(config, params).layers)[0], layer)
    x = jnp.full((1, 1, config.hidden_dim), 256, jnp.bfloat16)  # from there on bfloat16 has every second number
    rotation = text.rotation_at(config.rope, jnp.zeros((1, 1), int))
    found, _ = block(x, rotation, lambda query, new: (jnp.zeros_like(query), None))
    assert found.dtype == jnp.bfloat16 and (found == 258).all()


def test_norms_and_gates_round_once(folders: dict[str, Path]) -> None:
    config, _ = load_model(folders["llama"], jnp.float32)
    rng = np.random.default_rng(0)
    norm, mlp = text.RMSNorm(config.hidden_dim, 1e-6), text.MLP(config, nnx.Rngs(0))
    norm.weight[...] = jnp.asarray(rng.uniform(0.5, 2.0, config.hidden_dim), jnp.float32)
    x = jnp.asarray(rng.normal(size=(400, config.hidden_dim)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    weight = np.asarray(norm.weight[...].astype(jnp.bfloat16), np.float64)  # as products have it, and torch all weights
    normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weight
    gate, up = (np.asarray(linear(x), np.float64) for linear in (mlp.gate, mlp.up))
    mlp.down = lambda gated: gated
    for found, exact in ((jax.jit(lambda x: norm(x, x.dtype))(x), normed), (mlp(x), gate / (1.0 + np.exp(-gate)) * up)):
        # Rounded once more in the middle, about a fourth of them would be a unit off.
        assert (np.asarray(found) == np.asarray(exact, np.float32).astype(found.dtype)).mean() > 0.999


def test_bfloat16_is_computed_in_bfloat16_and_stays_close(folders: dict[str, Path]) -> None:
    config, params = load_model(folders["llama"], jnp.float32)
    # Positions above 256 are not all bfloat16 numbers: with angles computed in it, neighbours would coincide.
    token_ids, positions = tokens(1, 40), 300 + np.arange(40)[None]
    arrays = (token_ids, positions, np.ones_like(token_ids))
    half = run(config, params, *arrays, arrays[-1], remat="none", compute_dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    whole = np.asarray(hidden(config, params, *arrays))
    assert np.abs(np.asarray(half, np.float32) - whole).mean() < 0.03 * np.abs(whole).mean()


def export(params: text.Params, source: Path, folder: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Save a training state and export it, as a finished run does: folder/export."""
    state = folder / "state"
    state.mkdir()
    all_trained = Frozen(frozenset(), SIZES["num_hidden_layers"])
    write_state(snapshot(params, init_moments(params, offload=False), None, all_trained), state)
    export_model(state, source, folder / "export", dtype)


def test_random_parameters_fit_the_config_and_differ_between_layers(folders: dict[str, Path]) -> None:
    config, params = load_model(folders["qwen3-tied-sliding-biased"], jnp.float32)
    fresh = jax.jit(init_params, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, y.dtype), (y.shape, jnp.bfloat16)), params, fresh)
    up = np.asarray(fresh["layers"]["mlp"]["up"]["weight"], np.float32)
    assert not np.array_equal(up[0], up[1])
    assert up.std() == pytest.approx(0.02, rel=0.05)
    assert (fresh["norm"]["weight"] == 1).all() and (fresh["layers"]["attention"]["key"]["bias"] == 0).all()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-sliding", "qwen3"])
def test_saved_folder_loads_in_transformers_with_equal_logits(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config, params = load_model(folders[name], jnp.float32)
    params = jax.tree.map(lambda x: 1.01 * x, params)
    export(params, folders[name], tmp_path, "float32")
    token_ids = tokens(2, 20)
    theirs = reference_logits(tmp_path / "export", token_ids)
    np.testing.assert_allclose(logits(config, params, token_ids), theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_folders_round_trip_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    config, params = load_model(folders["qwen3"], jnp.float32)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    export(params, folders["qwen3"], tmp_path, "bfloat16")
    again, loaded = load_model(tmp_path / "export", jnp.bfloat16)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    np.testing.assert_array_equal(
        theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy(),
        np.asarray(params["layers"]["mlp"]["up"]["weight"][1], np.float32),
    )


def test_shards_load_like_one_file_and_go_where_they_are_placed(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    asked = {}

    def sharding(path: str, shape: tuple[int, ...]) -> Sharding:
        asked[path] = shape
        return SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")

    _, whole = load_model(folders["llama"], jnp.float32)
    _, sharded = load_model(tmp_path, jnp.float32, sharding)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(sharded)} == {"unpinned_host"}
    assert asked["layers.attention.query.weight"] == whole["layers"]["attention"]["query"]["weight"].shape
    assert asked["embed.weight"] == whole["embed"]["weight"].shape


def test_folders_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((folders["llama"] / "config.json").read_text())
    shutil.copy(folders["llama"] / "model.safetensors", tmp_path)
    for change, words in (
        ({"model_type": "gpt2"}, r"model_type = 'gpt2'"),
        ({"vocab_size": 62}, r"asks for \[62, 32\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path, jnp.float32)


def test_too_small_a_cache_is_refused() -> None:
    keys = jnp.zeros((3, 1, 2, 9, 16))
    with pytest.raises(ValueError, match="num_slots = 8"):
        expand_layer(text.KeyValues(keys, keys), 0, jnp.array([0]), 8)


def test_a_tied_folder_may_hold_a_copy_of_its_head(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["llama-tied-biased"]
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    assert "head" not in load_model(tmp_path, jnp.float32)[1]
