"""TorchJudge: a frozen model beside the policy that judges ask; LocalJudge of `common/serving/model.py` on PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.trainer import Sampling, SamplingPrompt
from safework_torch.decoding.prefill import prefill
from safework_torch.model import load_model, next_logits
from safework_torch.sampling import sample


class TorchJudge:
    """The model of a Hugging Face folder in one dtype, on the policy's device while it is asked."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._model = load_model(folder, self._device, self._dtype).eval().requires_grad_(False)

    @torch.inference_mode()
    def next_logprobs(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [N L]; see LocalJudge."""
        logits = next_logits(self._model, self._last(prompts))
        return logits.log_softmax(-1)[:, list(token_ids)].cpu().numpy()

    @torch.inference_mode()
    def head(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N C]; see LocalJudge."""
        last, score = self._last(prompts), cast(nn.Linear, self._model.score)
        return (last.float() @ score.weight.float().T).cpu().numpy()

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: tuple[int, ...]) -> list[np.ndarray]:
        """int32 [T] each; see LocalJudge."""
        greedy = Sampling(0.0, 1.0, 0, max_tokens, stop_ids, rows=len(prompts))
        numbers = np.zeros((1, max_tokens), np.float32)  # which greedy choice does not look at
        found = sample(self._awake(), [SamplingPrompt(prompt, numbers) for prompt in prompts], greedy, self._dtype)
        return [response.token_ids for (response,) in found]

    def rest(self) -> None:
        """Move the weights to host memory; see LocalJudge."""
        self._model.to(torch.device("cpu"))  # pyright: ignore[reportArgumentType]

    def _last(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """The hidden states of the prompts' last tokens [N D]."""
        return prefill(self._awake(), prompts, 0, self._dtype)[2]

    def _awake(self) -> PreTrainedModel:
        """The model, on the device."""
        return self._model.to(self._device)  # pyright: ignore[reportArgumentType]  (transformers wraps Module.to)
