"""Where the weights of a model live among the processes of a run: whole in one, in shards by FSDP2 in several.

Bytes a process holds for each parameter, at N processes, R of them on one host, products in bf16 (fp32: 4 in place of
2), without activations:

    mode     between updates    during one
    (one)    14                 18                  gradients added up in fp32; fp32: 12, 16
    zero1    12/N               12/N + 6            gradients whole until the last micro-batch, then reduced once
    zero2    12/N               16/N + 2            gradients reduced after each micro-batch
    zero3    12/N               16/N + one layer    weights gathered layer by layer, forward and backward
    hybrid   12/R               16/R + one layer    zero3 within each host, gradients summed across hosts

8 of these are moments, which `backend.offload_optimizer` leaves with the host. `backend.torch.offload_parameters`
leaves the fp32 weights there, and their gradients with them. Frozen weights have neither moments nor gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from common.config import ConfigError
from common.data.model_weights import open_tensors
from safework_torch.config import Sharding

Result = TypeVar("Result")


class Whole(nn.Module):
    """A model and the work with it, which every process does at the same time, or else within `gathered`. It comes
    empty, and `read` gives it weights.

    offload: the fp32 weights of what is trained rest in host memory, and their gradients with them; those of a model
    that is not come to the device for its work alone.
    """

    def __init__(self, model: PreTrainedModel, mode: Sharding, dtype: torch.dtype, *, offload: bool = False) -> None:
        super().__init__()
        self.model = model
        self._mode: Sharding = mode
        self._offload = offload
        self._is_trained = any(weight.requires_grad for weight in model.parameters())
        self._resting: dict[nn.Parameter, Tensor] = {}
        self._device: torch.device
        self._modules_in_shards: list[FSDPModule] = []
        self._copies_of_masters: list[Tensor] = []
        self.masters: dict[str, nn.Parameter]
        self._dtype = dtype
        if dist.is_initialized():
            self._shard()

    def read(self, folder: Path, device: torch.device) -> None:
        """Read the weights that this process holds from a model's folder, for work on a device."""
        self._device = device
        fill(self.model, folder, torch.device("cpu") if self._offload else device)
        self.model.model.rotary_emb.to(device)
        self.masters = self._masters()
        if self._offload and not self._is_trained and not self._modules_in_shards:
            self._resting = {weight: _pinned(weight.data) for weight in self.masters.values()}
            self.release()

    def _masters(self) -> dict[str, nn.Parameter]:
        """The fp32 weights, by name. Products in another dtype use copies, whose gradients are added up in fp32; in
        shards FSDP makes them.
        """
        named = dict(self.model.named_parameters())
        needs_copies = (self._offload and self._is_trained) or any(w.dtype != self._dtype for w in named.values())
        if self._modules_in_shards or not needs_copies:
            return named
        kept = _pinned if self._offload else Tensor.detach
        masters = {name: nn.Parameter(kept(copy.data), copy.requires_grad) for name, copy in named.items()}
        for name, copy in named.items():
            copy.data = copy.data.to(self._device, self._dtype, copy=True)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(_hand_on, masters[name]))
        self._copies_of_masters = [*named.values()]
        return masters

    @torch.no_grad()
    def follow_masters(self) -> None:
        """Bring the copies that products use up to the masters, which have changed."""
        if self._copies_of_masters:
            torch._foreach_copy_(self._copies_of_masters, [*self.masters.values()])  # pyright: ignore[reportPrivateImportUsage]

    @property
    def copies(self) -> int:
        """How often each shard is there among all processes."""
        return _mesh(self._mode)["replica"].size() if self._modules_in_shards and self._mode == "hybrid" else 1

    def _shard(self) -> None:
        dtypes = {"param_dtype": self._dtype, "reduce_dtype": torch.float32}
        placed: dict[str, Any] = {
            "mesh": _mesh(self._mode),
            "mp_policy": MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False),
            "reshard_after_forward": self._mode in ("zero3", "hybrid"),
        }
        if self._offload:
            placed["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for layer in self.model.model.layers:
            fully_shard(layer, **placed)
        fully_shard(self, **{**placed, "reshard_after_forward": False})
        self._modules_in_shards = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for module in self._modules_in_shards:
            # The weights of tokens know the counts over all processes: gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def forward(self, work: Callable[..., Result], *inputs: Any) -> Result:
        """`work` of the model and the inputs; FSDP gathers the outermost weights around it."""
        for weight, resting in self._resting.items():
            if weight.data_ptr() == resting.data_ptr():
                weight.data = resting.to(self._device, non_blocking=True)
        return work(self.model, *inputs)

    def begin_microbatch(self, is_last: bool) -> None:
        """With `zero1`, gradients are reduced in the last micro-batch of an update alone, and weights kept up to it."""
        for module in self._modules_in_shards if self._mode == "zero1" else ():
            module.set_requires_gradient_sync(is_last, recurse=False)
            module.set_reshard_after_backward(is_last, recurse=False)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole, in the dtype of products, so that each process may work on its own for a while."""
        layers = [module for module in self._modules_in_shards if module is not self]
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        for module in self._modules_in_shards:
            module.unshard()
        try:
            yield
        finally:
            self.release()
            for layer in layers:
                layer.set_reshard_after_forward(self._mode in ("zero3", "hybrid"), recurse=False)

    def release(self) -> None:
        """Let go of weights that came for a pass: without a backward one, they would outlive the next update."""
        for module in self._modules_in_shards:
            module.reshard()
        for weight, resting in self._resting.items():
            weight.data = resting


def _hand_on(master: nn.Parameter, copy: Tensor) -> None:
    """Add a copy's gradient, complete for this micro-batch, to its master's; it is gone before the next one comes."""
    assert copy.grad is not None, "the hook runs behind the gradient"
    gradient = copy.grad.to(master.device)
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    copy.grad = None


def _pinned(weight: Tensor) -> Tensor:
    """In memory of the host from which a GPU copies."""
    return weight.pin_memory() if torch.cuda.is_available() else weight


def _mesh(mode: Sharding) -> DeviceMesh:
    device, count = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size()
    if mode != "hybrid":
        return init_device_mesh(device, (count,), mesh_dim_names=("fsdp",))
    each = int(os.environ["LOCAL_WORLD_SIZE"])
    if count % each:
        raise ConfigError(
            f"backend.torch.sharding = hybrid: {count} processes are not a whole number of hosts with {each}. Start as "
            "many on each host, or choose zero3."
        )
    return init_device_mesh(device, (count // each, each), mesh_dim_names=("replica", "fsdp"))


@torch.no_grad()
def fill(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Read the weights of an empty model onto a device, of each the part that this process holds."""
    found: dict[nn.Parameter, nn.Parameter] = {}  # a tied head is the embedding, and stays it
    with ExitStack() as files:
        tensors = open_tensors(folder, files, "pt")
        for name, weight in list(model.named_parameters(remove_duplicate=False)):
            if weight not in found:
                found[weight] = nn.Parameter(_read(tensors[name], name, weight, device), weight.requires_grad)
            put(found[weight], model, name)


def put(weight: nn.Parameter, module: nn.Module, name: str) -> None:
    """Set the parameter of that name, such as `mlp.up_proj.weight`, of a module."""
    owner, _, own_name = name.rpartition(".")
    setattr(module.get_submodule(owner), own_name, weight)


def _read(file: Any, name: str, like: Tensor, device: torch.device) -> Tensor:
    weight = torch.empty_like(like, device=device)
    own = local(weight)
    if own.numel():
        own.copy_(file.get_slice(name)[own_part(like)])
    return weight


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host on the device. The host does not wait for what the device still does."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))  # with strides it would go through memory that is not pinned
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """A tensor of the device on its way to the host, which will wait for it and not for work handed out behind it."""

    def __init__(self, tensor: Tensor) -> None:
        self._there = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._there.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._there


def local(tensor: Tensor) -> Tensor:
    """The part of a weight or gradient that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a weight or gradient, on the device; every process must ask at the same time."""
    if not isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(there, DTensor)
    return there.full_tensor()


def own_part(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole weight `local` is."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    [chunk] = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def is_first_copy(tensor: Tensor) -> bool:
    """Whether this process is the first of those that hold the same part of a weight."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every process is in the mesh"
    return all(place == 0 for place, how in zip(coordinate, tensor.placements, strict=True) if how.is_replicate())


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, laid out as `target` is."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    return whole.to(target.device)
