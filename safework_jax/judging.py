"""JaxJudge: a frozen model beside the policy that judges ask; LocalJudge of `common/serving/model.py` on JAX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.data.model_config import is_classifier, read_model_config
from common.data.model_weights import read_score_head
from common.trainer import Sampling, SamplingPrompt
from safework_jax.layout import layout_on
from safework_jax.model import load_model
from safework_jax.models.decoder.config import DecoderConfig
from safework_jax.models.decoder.text import Params, next_logits
from safework_jax.sampling import Decoding, last_hidden, sample
from safework_jax.sharding import parameter_sharding


class JaxJudge:
    """The model of a Hugging Face folder in one dtype, over the policy's devices while it is asked."""

    def __init__(self, folder: Path, dtype: str, mesh: Mesh) -> None:
        self._dtype = jnp.dtype(dtype)
        model, self._params = load_model(folder, self._dtype, partial(parameter_sharding, mesh=mesh))
        self._decoding = Decoding(model, self._dtype, layout_on(mesh, model, self._dtype, share_prompts=False))
        self._shardings = jax.tree.map(lambda x: x.sharding, self._params)
        self._head = read_score_head(folder) if is_classifier(read_model_config(folder)) else None

    def next_logprobs(self, prompts: Sequence[np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
        """float32 [N L]; see LocalJudge."""
        last = self._last(prompts)
        return np.asarray(_logprobs(self._params, last, np.asarray(token_ids), self._decoding.model))[: len(prompts)]

    def head(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N C]; see LocalJudge."""
        assert self._head is not None, "a model with a vocabulary has no head"
        return np.asarray(self._last(prompts).astype(jnp.float32) @ self._head.T)[: len(prompts)]

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: tuple[int, ...]) -> list[np.ndarray]:
        """int32 [T] each; see LocalJudge."""
        self._wake()
        greedy = Sampling(0.0, 1.0, 0, max_tokens, stop_ids, rows=len(prompts))
        numbers = np.zeros((1, max_tokens), np.float32)  # which greedy choice does not look at
        asked = [SamplingPrompt(prompt, numbers) for prompt in prompts]
        return [response.token_ids for (response,) in sample(self._decoding, self._params, asked, greedy)]

    def rest(self) -> None:
        """Move the weights to host memory; see LocalJudge."""
        self._params = jax.device_get(self._params)

    def _last(self, prompts: Sequence[np.ndarray]) -> jax.Array:
        """The hidden states of the prompts' last tokens [N D], with rows of padding behind them."""
        self._wake()
        return last_hidden(self._decoding, self._params, prompts)

    def _wake(self) -> None:
        self._params = jax.device_put(self._params, self._shardings)


@partial(jax.jit, static_argnames="config")
def _logprobs(params: Params, last: jax.Array, wanted: jax.Array, config: DecoderConfig) -> jax.Array:
    """Last hidden states [R D], token ids [L] -> the log-probabilities of those tokens, fp32 [R L]."""
    return jax.nn.log_softmax(next_logits(config, params, last), axis=-1)[:, wanted]
