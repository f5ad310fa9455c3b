"""Training state on disk: parameters and AdamW moments as safetensors under Hugging Face names, fp32, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILES = {"model": "model.safetensors", "exp_avg": "first_moment.safetensors", "exp_avg_sq": "second_moment.safetensors"}
STEP = "step"


def save_state(model: nn.Module, optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Write parameters and moments into a folder. Raises OSError when the disk does."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    steps = {int(entry["step"]) for entry in state.values() if entry}
    assert len(steps) <= 1, "all parameters are stepped together"
    metadata = {STEP: str(steps.pop() if steps else 0)}
    _write(named, folder / FILES["model"], metadata)
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors = {name: entry[moment] if entry else torch.zeros_like(named[name]) for name, entry in state.items()}
        _write(tensors, folder / FILES[moment], metadata)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # how this library reports a full disk
        raise OSError(f"{path.name}: {error}") from error


def restore_state(model: nn.Module, optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Read back what `save_state` wrote."""
    from safetensors import safe_open

    with safe_open(folder / FILES["model"], "pt") as file:
        count = int(file.metadata()[STEP])
    weights, first, second = (load_file(folder / name) for name in FILES.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(count)),
                "exp_avg": first.pop(name).to(parameter.device),
                "exp_avg_sq": second.pop(name).to(parameter.device),
            }
