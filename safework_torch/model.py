"""Hugging Face causal language models as this engine uses them: loading and the packed forward pass.

Rows are packed: the attention mask and the positions are always explicit, never inferred.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.config import ConfigError

# Families whose attention, rotary embedding and head were checked against Hugging Face on packed rows.
# True: the family may mix full and sliding-window layers, and takes one mask for each kind.
FAMILIES = {"llama": False, "qwen2": True, "qwen3": True}

# Rotary embeddings whose angles depend on a token's position alone, not on what else is in the row.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_KEPT_BY_DOTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """The model of a Hugging Face folder in fp32, in training mode, on a device.

    Raises ConfigError for a family or rotary type that is not supported, layers that slide without a window, quantised
    weights, active dropout, and tensors that do not fit config.json.
    """
    config = AutoConfig.from_pretrained(folder)
    _check(config, folder)
    transformers_logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    model, report = loaded
    _check_weights(model, report, folder)
    # torch gives the padding token's embedding no gradient; here padding is no token, and often the end token is.
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.padding_idx = None
    return model.train().to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps Module.to)


def _check(config: PreTrainedConfig, folder: Path) -> None:
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model folder {folder}: model_type {config.model_type!r} is not supported. "
            f"Supported: {', '.join(FAMILIES)}."
        )
    settings = config.to_dict()
    if "quantization_config" in settings:
        raise ConfigError(f"model folder {folder}: quantised weights cannot be trained. Use the original checkpoint.")
    rope_type = (settings.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"model folder {folder}: rope_type = {rope_type!r} in config.json; allowed are {', '.join(ROPE_TYPES)}."
        )
    if "sliding_attention" in settings.get("layer_types", ()) and settings.get("sliding_window") is None:
        raise ConfigError(
            f"model folder {folder}: layer_types in config.json names sliding_attention, but no sliding_window is in "
            "force. Set use_sliding_window and sliding_window, or name full_attention."
        )
    if settings["attention_dropout"] != 0:
        raise ConfigError(
            f"model folder {folder}: attention_dropout = {settings['attention_dropout']} in config.json; sampling and "
            "training would see different models. Set it to 0."
        )


def _check_weights(model: PreTrainedModel, report: dict[str, Any], folder: Path) -> None:
    # transformers makes up what a file lacks, and unties a head that differs from the embedding, with a log line.
    wrong = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected") if report[f"{kind}_keys"]}
    if wrong:
        found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ConfigError(f"model folder {folder}: its tensors do not fit its config.json: {found}.")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise ConfigError(
            f"model folder {folder}: config.json ties the head to the embedding, but lm_head.weight differs from it. "
            "Set tie_word_embeddings to false, or remove lm_head.weight."
        )


def recompute(model: PreTrainedModel, mode: str) -> None:
    """Keep less for the backward pass: `none` keeps all, `dots` matrix products only, `full` layer inputs only."""
    if mode == "none":
        return
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_dots)} if mode == "dots" else {}
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def _keep_dots(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT_BY_DOTS else CheckpointPolicy.PREFER_RECOMPUTE


def hidden_states(
    model: PreTrainedModel, token_ids: Tensor, positions: Tensor, segment_ids: Tensor, prefix_ids: Tensor
) -> Tensor:
    """Final hidden states of packed rows: int [B T] four times, as in TrainBatch -> float [B T D]."""
    masks = packed_masks(model.config, positions, segment_ids, prefix_ids)
    output = model.model(input_ids=token_ids, position_ids=positions, attention_mask=masks, use_cache=False)
    return output.last_hidden_state


def packed_masks(
    config: PreTrainedConfig, positions: Tensor, segment_ids: Tensor, prefix_ids: Tensor
) -> Tensor | dict[str, Tensor]:
    """Causal attention within each segment and to its prefix: bool [B 1 T T], or one for each kind of layer.

    Padding is a segment of its own that attends to itself: a fully masked row would be NaN.
    """
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    keys = segment_ids[:, None, None, :]
    seen = (segment_ids[:, None, :, None] == keys) | (prefix_ids[:, None, :, None] == keys)
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    return by_layer_kind(config, seen & (place[:, None] >= place), distance)


def by_layer_kind(config: PreTrainedConfig, full: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask in the form the family takes. distance: int, query position minus key position, as `full` broadcasts."""
    if not FAMILIES[config.model_type]:
        return full
    masks = {"full_attention": full}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = full & (distance < config.sliding_window)
    return masks


def head(model: PreTrainedModel) -> nn.Parameter:
    """The output projection [V D]; the token embedding itself when the two are tied."""
    return model.lm_head.weight
