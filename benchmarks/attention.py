"""On a GPU: each attention kernel of the torch engine against the masked reference, forward and backward, in bf16.

    python benchmarks/attention.py

Prints the relative L2 difference of the output and of the gradient by query, key and value, on rows packed in several
ways. bf16 keeps 8 bits: a few thousandths.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from safework_torch.attention import Mask, Packing, block_mask, fast_kernels, packed_attention, reference_mask
from tests.training import packed, random_sequences

HEADS, KEY_HEADS, DIM = 14, 2, 64


def main() -> None:
    """One line for each packing and window."""
    for tokens in (1024, 1000):
        for name, changes in (
            ("packed", {}),
            ("prompts shared", {"share_prompts": True}),
            ("alone", {"packed": False}),
        ):
            count = 4 if name == "alone" else 300
            batch = packed(random_sequences(count, group_size=4), tokens, **changes)
            where = Packing(batch.positions, batch.segment_ids, batch.prefix_ids)
            real = torch.from_numpy(where.segment_ids > 0).cuda()
            for window in (None, 7):
                expected = outcome(reference_mask(where, window).cuda(), where, real)
                kernels: dict[str, Mask] = {"flex": block_mask(where, window, torch.device("cuda"))}
                if name == "alone" and window is None:
                    kernels["causal"] = None
                for kernel, mask in kernels.items():
                    found = outcome(mask, where, real)
                    off = [
                        float((ours - exact).norm() / exact.norm()) for ours, exact in zip(found, expected, strict=True)
                    ]
                    print(
                        f"{tokens} {name:15s} window {window} {kernel:7s}",
                        " ".join(f"{x:.1e}" for x in off),
                        flush=True,
                    )


def outcome(mask: Mask, where: Packing, real: Tensor) -> list[Tensor]:
    """What attention gives to tokens that are no padding, and its gradient by query, key and value, fp32."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, length = where.positions.shape
    heads = [
        torch.randn(
            (rows, number, length, DIM), generator=generator, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()
        for number in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    with fast_kernels():
        mixed = packed_attention(nn.Identity(), *heads, mask, DIM**-0.5)[0] * real[:, :, None, None]
        weights = torch.randn(mixed.shape, generator=generator, device="cuda")
        return [mixed.float(), *(x.float() for x in torch.autograd.grad((mixed * weights).sum(), heads))]


if __name__ == "__main__":
    main()
