"""vLLM's HTTP dialect, 0.24 and later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from common.serving.dialect import Rendered, Seen
from common.serving.http import Call

MODELS, API = "/v1/models", "/openapi.json"

# The most probable token each time. A server takes what is not said here from the model's own generation_config.json,
# where a repetition penalty would tell a judge to avoid the words of its question.
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_MOST = 20  # logprobs a position that a server gives unless it was started with another limit


def identity(reply: Any) -> tuple[str, str]:
    """See Dialect; vLLM tells the name or folder that it loaded."""
    model = reply["data"][0]
    return model["id"], model["root"]


def generate(name: str, question: Rendered, max_tokens: int) -> Call:
    """See Dialect."""
    payload = {"model": name, "max_tokens": max_tokens, **_GREEDY}
    if isinstance(question, Seen):
        return Call("/v1/chat/completions", payload | {"messages": question.turns}, _chat_text)
    return Call("/v1/completions", payload | {"prompt": question.tolist()}, _text)


def label_logprobs(name: str, question: Rendered, label_ids: Sequence[int], api: Any) -> list[Call]:
    """See Dialect. Versions that cannot be asked for given tokens are asked for the prompt's, a label behind it each
    time; with images, for the twenty most probable ones, among which the labels must be.
    """
    payload = {"model": name, "max_tokens": 1, "return_tokens_as_token_ids": True, **_GREEDY}
    named = "logprob_token_ids" in api["components"]["schemas"]["CompletionRequest"]["properties"]  # not yet in 0.24
    if isinstance(question, Seen):
        asked = {"logprob_token_ids": list(label_ids), "top_logprobs": 0} if named else {"top_logprobs": _MOST}
        asked |= {"messages": question.turns, "logprobs": True}
        return [Call("/v1/chat/completions", payload | asked, partial(_chat_logprobs, label_ids))]
    prompt = question.tolist()
    if named:
        asked = {"prompt": prompt, "logprobs": 0, "logprob_token_ids": list(label_ids)}
        return [Call("/v1/completions", payload | asked, partial(_logprobs, label_ids))]
    return [
        Call(
            "/v1/completions",
            payload | {"prompt": [*prompt, token], "prompt_logprobs": 0},
            partial(_last_logprob, token),
        )
        for token in label_ids
    ]


def _logprobs(label_ids: Sequence[int], reply: Any) -> np.ndarray:
    found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    return np.array([found[f"token_id:{token}"] for token in label_ids], np.float32)


def _chat_logprobs(label_ids: Sequence[int], reply: Any) -> np.ndarray:
    listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {entry["token"]: entry["logprob"] for entry in listed}
    return np.array([found[f"token_id:{token}"] for token in label_ids], np.float32)


def _last_logprob(token: int, reply: Any) -> np.ndarray:
    return np.array([reply["choices"][0]["prompt_logprobs"][-1][str(token)]["logprob"]], np.float32)


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
