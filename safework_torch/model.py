"""Hugging Face causal language models as this engine uses them: loading and the packed forward pass.

Rows are packed: the attention mask and the positions are always explicit, never inferred.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from common.data.model_config import is_classifier
from common.data.model_weights import checked_model

# Families that may mix full and sliding-window layers, and take one mask for each kind.
_MIXING_FAMILIES = ("qwen2", "qwen3")

_KEPT_BY_DOTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a Hugging Face folder in training mode, on a device: a causal language model, or a classifier.

    Raises ConfigError for a config.json that the engines do not compute, and for tensors that do not fit it.
    """
    hf = checked_model(folder)  # transformers makes up what a file lacks, with a log line
    kind = AutoModelForSequenceClassification if is_classifier(hf) else AutoModelForCausalLM
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    # torch gives the padding token's embedding no gradient; here padding is no token, and often the end token is.
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.padding_idx = None
    return model.train().to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps Module.to)


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
    if config.model_type not in _MIXING_FAMILIES:
        return full
    masks = {"full_attention": full}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = full & (distance < config.sliding_window)
    return masks


def next_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states [P D] -> the logits of the tokens after them, fp32 [P V]."""
    return (hidden @ head(model).to(hidden.dtype).T).float()


def head(model: PreTrainedModel) -> nn.Parameter:
    """The output projection [V D]; the token embedding itself when the two are tied."""
    return model.lm_head.weight
