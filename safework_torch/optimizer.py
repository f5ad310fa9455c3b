"""The written AdamW rule in torch: eps outside the root, decoupled decay on matrices only, one global-norm clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.config.method import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over fp32 master weights; its learning rate is set before every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Root of the sum of squares of all elements, fp32 scalar."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def step(optimizer: torch.optim.AdamW, gradients: Sequence[Tensor], norm: float, clip_norm: float, rate: float) -> None:
    """Scale gradients of global norm `norm` down to `clip_norm` if they exceed it, then one AdamW step at `rate`."""
    if norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
