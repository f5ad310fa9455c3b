"""vLLM's HTTP dialect, 0.24 and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.serving.dialect import Rendered, Seen
from common.serving.http import Call

MODELS = "/v1/models"


def identity(reply: Any) -> tuple[str, str]:
    """See Dialect; vLLM tells the name or folder that it loaded."""
    model = reply["data"][0]
    return model["id"], model["root"]


def generate(name: str, question: Rendered, max_tokens: int) -> Call:
    """See Dialect."""
    payload = {"model": name, "max_tokens": max_tokens, "temperature": 0}
    if isinstance(question, Seen):
        return Call("/v1/chat/completions", payload | {"messages": question.turns}, _chat_text)
    return Call("/v1/completions", payload | {"prompt": question.tolist()}, _text)


def label_logprobs(name: str, question: Rendered, label_ids: Sequence[int]) -> Call:
    """See Dialect."""
    payload = {
        "model": name,
        "max_tokens": 1,
        "temperature": 0,
        "logprob_token_ids": list(label_ids),
        "return_tokens_as_token_ids": True,
    }
    keys = [f"token_id:{token}" for token in label_ids]
    if isinstance(question, Seen):

        def read_chat(reply: Any) -> np.ndarray:
            listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["token"]: entry["logprob"] for entry in listed}
            return np.array([found[key] for key in keys], np.float32)

        asked = {"messages": question.turns, "logprobs": True, "top_logprobs": 0}
        return Call("/v1/chat/completions", payload | asked, read_chat)

    def read(reply: Any) -> np.ndarray:
        found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
        return np.array([found[key] for key in keys], np.float32)

    return Call("/v1/completions", payload | {"prompt": question.tolist(), "logprobs": 0}, read)


def head(name: str, question: Rendered) -> Call:
    """See Dialect."""
    # Without the switch vLLM sends a sigmoid or softmax of them.
    payload: dict[str, Any] = {"model": name, "use_activation": False}
    asked = {"messages": question.turns} if isinstance(question, Seen) else {"input": question.tolist()}
    return Call("/classify", payload | asked, lambda reply: np.array(reply["data"][0]["probs"], np.float32))


def _text(reply: Any) -> str:
    return _checked(reply["choices"][0]["text"])


def _chat_text(reply: Any) -> str:
    return _checked(reply["choices"][0]["message"]["content"])


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError("the text is none")
    return text
