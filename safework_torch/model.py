"""Hugging Face causal language models as this engine uses them: loading and the forward pass over packed rows.

What the host must know of a micro-batch is worked out before it goes to the device: a question to the device, such as
how many tokens were sampled, waits for all that it still does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from common.data.frozen import frozen_names
from common.data.model_config import is_classifier
from common.data.model_weights import checked_model
from common.types import TrainBatch
from safework_torch.attention import PACKED, Packing, packed_masks
from safework_torch.sharding import fill, sent
from safework_torch.token_logprobs import token_logprobs

Recompute = Literal["none", "dots", "full"]
Rotation = tuple[Tensor, Tensor]

_KEPT_BY_DOTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass(frozen=True)
class Microbatch:
    """arrays: those of a TrainBatch by name, [B T] on the device. packing: the same on the host, for masks.

    row, place, before, targets: int64 [N], of each sampled token its row and place, the place of the one before it in
    its sequence, counted through all rows, and the token itself. is_last: whether an update ends with it.
    """

    arrays: dict[str, Tensor]
    packing: Packing
    row: Tensor
    place: Tensor
    before: Tensor
    targets: Tensor
    is_last: bool

    def in_place(self, values: Tensor) -> Tensor:
        """Values [N] of the sampled tokens -> [B T], 0 elsewhere."""
        zeros = values.new_zeros(self.arrays["sampled"].shape)
        return zeros.index_put((self.row, self.place), values)  # no view of it, which FSDP2 warns of


def microbatch(batch: TrainBatch, rows: slice, device: torch.device, *, is_last: bool) -> Microbatch:
    """The given rows of a batch."""
    own = {name: array[rows] for name, array in vars(batch).items() if array is not None}
    row, place = own["sampled"].nonzero()
    tokens = {
        "row": row,
        "place": place,
        "before": row * own["sampled"].shape[1] + own["previous"][row, place],
        "targets": own["token_ids"][row, place].astype(np.int64),
    }
    return Microbatch(
        arrays={name: sent(array, device) for name, array in own.items()},
        packing=Packing(own["positions"], own["segment_ids"], own["prefix_ids"]),
        **{name: sent(array, device) for name, array in tokens.items()},
        is_last=is_last,
    )


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """`empty_model` with its weights, whole on one device."""
    model = empty_model(folder, dtype)
    fill(model, folder, device)
    model.model.rotary_emb.to(device)
    return model


def empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face folder in training mode, a causal language model or a classifier. Its weights are on
    the meta device until `fill` reads them.

    Raises ConfigError for a config.json that the engines do not compute, and for tensors that do not fit it.
    """
    checked_model(folder)
    return model_without_weights(AutoConfig.from_pretrained(folder), dtype)


def model_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """`empty_model` of an accepted config alone."""
    kind = AutoModelForSequenceClassification if is_classifier(config.to_dict()) else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, dtype=dtype, attn_implementation=PACKED)
    # torch gives the padding token's embedding no gradient; here padding is no token, and often the end token is.
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.padding_idx = None
    rotary = type(model.model.rotary_emb)(model.config)  # its frequencies are in no file
    rotary.forward = partial(_rotation, rotary.forward)
    model.model.rotary_emb = rotary
    return model.train()


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Train all weights of a model but those whose names a pattern matches."""
    named = dict(model.named_parameters())
    for name in frozen_names(named, patterns):
        named[name].requires_grad_(False)


def _rotation(rotation_at: Callable[..., Rotation], x: Tensor, position_ids: Tensor) -> Rotation:
    """Cosines and sines in float32, of whatever dtype `x` is: queries and keys are rotated before they are rounded."""
    return rotation_at(x.new_empty(0, dtype=torch.float32), position_ids=position_ids)


def prepare_layers(model: PreTrainedModel, recompute: Recompute, compiled: bool) -> None:
    """Compile each layer and the last norm, and keep less of a layer for the backward pass: `none` keeps all, `dots`
    matrix products only, `full` layer inputs only. Compiled layers keep no more than `dots` does in any case.
    """
    settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn: dropout is refused
    for layer in model.model.layers:
        if recompute == "full":  # under the compiler, which leaves out what no gradient needs, as the last product
            layer.forward = partial(checkpoint, layer.forward, **settings)
        elif recompute == "dots" and not compiled:
            contexts = partial(create_selective_checkpoint_contexts, _keep_dots)
            layer.forward = partial(checkpoint, layer.forward, context_fn=contexts, **settings)
        if compiled:
            layer.forward = torch.compile(layer.forward)
    if compiled:
        model.model.norm.forward = torch.compile(model.model.norm.forward)


def _keep_dots(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT_BY_DOTS else CheckpointPolicy.PREFER_RECOMPUTE


def hidden_states(model: PreTrainedModel, token_ids: Tensor, positions: Tensor, packing: Packing) -> Tensor:
    """Final hidden states of packed rows, [B T D] in the dtype of the model: token ids and positions int [B T] on its
    device, and their packing.
    """
    masks = packed_masks(model.config, packing, token_ids.device)
    ids, places = token_ids.long(), positions.long()
    return model.model(input_ids=ids, position_ids=places, attention_mask=masks, use_cache=False).last_hidden_state


def packed_logprobs(
    model: PreTrainedModel, rows: Microbatch, temperature: float, keep_logits: bool
) -> tuple[Tensor, Tensor]:
    """Logprobs (differentiable) and entropies of sampled tokens, fp32 [B T], 0 elsewhere. keep_logits: in place of
    computing them again for the backward pass.
    """
    hidden = hidden_states(model, rows.arrays["token_ids"], rows.arrays["positions"], rows.packing)
    found = token_logprobs(hidden, head(model), rows.targets, rows.before, temperature, keep_logits)
    logprobs, entropy = map(rows.in_place, found)
    return logprobs, entropy


def next_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states [P D] -> the logits of the tokens after them, fp32 [P V]."""
    return wide_product(hidden, head(model).to(hidden.dtype).T)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """[P D] @ [D V] in fp32, not rounded to the dtype of the factors where the device can do without."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def head(model: PreTrainedModel) -> nn.Parameter:
    """The output projection [V D]; the token embedding itself when the two are tied."""
    return model.lm_head.weight
