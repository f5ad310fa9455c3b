"""What a decoder layer holds during training, counted without a GPU and without numbers in its tensors.

A layer that `torch.compile` compiles is traced and parted into its two passes by torch's own partitioner, as the
compiler does it: what passes from one to the other is kept. Within a pass an array is in memory where a product,
attention, a sum or the other pass needs it; everything between those is one kernel's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx import Graph, GraphModule, Node
from transformers import AttentionInterface, PreTrainedConfig

from common.data.model_config import head_dim
from safework_torch.model import Recompute, model_without_weights, prepare_layers
from safework_torch.sharding import put

_ON_GPU = "safework_on_gpu"  # attention as `packed_attention` has it on a GPU, where there is none
_KERNELS = ("mm", "addmm", "bmm", "_scaled_dot_product_", "convolution")
_SUMS = ("sum", "mean", "amax", "var")


class LayerBytes(NamedTuple):
    """kept: between a layer's two passes, its output counted and its input not. backward: the most that its backward
    pass adds to that at one time, the gradients of its weights counted.
    """

    kept: int
    backward: int


class Rows(NamedTuple):
    """Rows of a micro-batch on one GPU, and tokens of each."""

    number: int
    length: int


def layer_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, rows: Rows, recompute: Recompute, compiled: bool
) -> LayerBytes:
    """Count one layer of a model's, of any depth."""
    model = model_without_weights(config, dtype)
    model.config._attn_implementation = _ON_GPU
    if not compiled:
        prepare_layers(model, recompute, compiled=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, inputs = _layer_call(model, dtype, rows)
        if not compiled:
            return _counted(run, inputs)
        found = _parted(run, inputs)
    if recompute == "full":
        output = rows.number * rows.length * config.hidden_size * dtype.itemsize
        return LayerBytes(output, found.kept - output + found.backward)
    return found


def _layer_call(model: Any, dtype: torch.dtype, rows: Rows) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A layer as a function of its input, rotary turns and weights, and these."""
    config, layer = model.config, model.model.layers[0]
    x = torch.empty(rows.number, rows.length, config.hidden_size, dtype=dtype, requires_grad=True)
    cos, sin = (torch.empty(1, rows.length, head_dim(config.to_dict())) for _ in range(2))
    for name, weight in list(layer.named_parameters()):
        put(nn.Parameter(torch.empty(weight.shape, dtype=dtype)), layer, name)
    weights = dict(layer.named_parameters())

    def run(x: Tensor, cos: Tensor, sin: Tensor, *given: Tensor) -> Tensor:
        own = dict(zip(weights, given, strict=True))
        return torch.func.functional_call(layer, own, (x,), {"attention_mask": None, "position_embeddings": (cos, sin)})

    return run, [x, cos, sin, *weights.values()]


def _counted(run: Callable[..., Tensor], inputs: list[Tensor]) -> LayerBytes:
    """Of a layer whose operations run one by one."""
    tracker = MemTracker()
    tracker.track_external(*inputs)
    with tracker:
        before = _total(tracker, "current")
        output = run(*inputs)
        kept = _total(tracker, "current") - before
        output.backward(torch.empty_like(output))
    return LayerBytes(kept, _total(tracker, "peak") - kept - before)


def _total(tracker: MemTracker, when: str) -> int:
    return sum(int(found["Total"]) for found in tracker.get_tracker_snapshot(when).values())


def _parted(run: Callable[..., Tensor], inputs: list[Tensor]) -> LayerBytes:
    """Of a layer that is compiled."""
    passes: list[Graph] = []

    def take(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        passes.append(gm.graph)
        return make_boxed_func(gm)

    parted = aot_function(
        run,
        fw_compiler=take,
        bw_compiler=take,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    output = parted(*inputs)
    output.backward(torch.empty_like(output))
    forward, backward = passes
    kept = _results(forward)
    return LayerBytes(kept, max(0, _peak(backward) - _bytes_of(_given(backward))))


def _given(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _results(graph: Graph) -> int:
    """Bytes of what a pass returns and was not given: views of weights are weights."""
    given = {_storage(node) for node in _given(graph)}
    return _bytes_of([node for node in _outputs(graph) if _storage(node) not in given])


def _outputs(graph: Graph) -> list[Node]:
    *_, last = graph.nodes
    return last.all_input_nodes


def _bytes_of(nodes: list[Node]) -> int:
    sizes = {_storage(node): _size(node) for node in nodes}
    return sum(size for storage, size in sizes.items() if storage is not None)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0


def _peak(graph: Graph) -> int:
    """The most bytes in memory at one time of a pass, from what it is given to what it returns."""
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    held = {node: node.op == "placeholder" or _is_made(node) for node in nodes}
    until = dict(place)
    for node in reversed(nodes):  # what one kernel does is done where its result is made
        ends = [place[user] if held[user] or user.op == "output" else until[user] for user in node.users]
        until[node] = max([until[node], *ends])
    spans: dict[int, tuple[int, int, int]] = {}
    for node in nodes:
        storage = _storage(node)
        if storage is None or not (held[node] or storage in spans):
            continue
        begin = 0 if node.op == "placeholder" else place[node]
        first, last, size = spans.get(storage, (begin, begin, _size(node)))
        spans[storage] = first, max(last, until[node]), size
    return max(sum(size for first, last, size in spans.values() if first <= now <= last) for now in range(len(nodes)))


def _is_made(node: Node) -> bool:
    """Whether an operation's result is an array of its own in memory."""
    if node.op != "call_function" or _is_view(node):
        return False
    return _is(node, _KERNELS) or _is(node, _SUMS) or _is_wanted(node)


def _is_wanted(node: Node) -> bool:
    return any(
        user.op == "output" or _is(user, _KERNELS) or (_is_view(user) and _is_wanted(user)) for user in node.users
    )


def _is_view(node: Node) -> bool:
    storage = _storage(node)
    return storage is not None and any(_storage(source) == storage for source in node.all_input_nodes)


def _is(node: Node, names: tuple[str, ...]) -> bool:
    return str(node.target).removeprefix("aten.").startswith(names)


def _on_gpu(
    _layer: object, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """`packed_attention` by cuDNN's causal kernel; flex attention keeps and needs the same."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    kernel = partial(torch.ops.aten._scaled_dot_product_cudnn_attention, query, key, value, attention_mask)
    return kernel(True, 0.0, True, False, scale=scaling)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register(_ON_GPU, _on_gpu)
