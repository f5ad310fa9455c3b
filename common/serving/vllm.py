"""vLLM's HTTP dialect, 0.24 and later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from common.serving.dialect import Rendered, Seen, sound_outputs, sound_text
from common.serving.http import Call, Unanswered

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


def label_logprobs(name: str, question: Rendered, label_ids: Sequence[int], api: Any) -> Call:
    """See Dialect. In 0.24 the OpenAI routes cannot be asked for given tokens, and its route of token ids can; with
    images it is asked for the twenty most probable tokens, among which the labels must be.
    """
    named = _takes_tokens(api)
    labels = {"logprob_token_ids": list(label_ids)}
    payload = {"model": name, "max_tokens": 1, "return_tokens_as_token_ids": True, **_GREEDY}
    if isinstance(question, Seen):
        asked = labels | {"top_logprobs": 0} if named else {"top_logprobs": _MOST}
        asked |= {"messages": question.turns, "logprobs": True}
        read = _chat_logprobs if named else _most_probable
        return Call("/v1/chat/completions", payload | asked, partial(read, label_ids))
    if named:
        asked = labels | {"prompt": question.tolist(), "logprobs": 0}
        return Call("/v1/completions", payload | asked, partial(_logprobs, label_ids))
    # The reply lists as many tokens as there are labels, what was sampled first: so that has to be one of them.
    sampling = {"max_tokens": 1, "logprobs": len(label_ids), "allowed_token_ids": list(label_ids), **labels, **_GREEDY}
    asked = {"model": name, "token_ids": question.tolist(), "sampling_params": sampling}
    return Call("/inference/v1/generate", asked, partial(_chat_logprobs, label_ids))


def _takes_tokens(api: Any) -> bool:
    """Whether the OpenAI routes take the tokens that are asked for; a server without them says so when it is asked."""
    try:
        return "logprob_token_ids" in api["components"]["schemas"]["CompletionRequest"]["properties"]
    except (KeyError, TypeError):
        return False


def _logprobs(label_ids: Sequence[int], reply: Any) -> np.ndarray:
    found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    return np.array([found[f"token_id:{token}"] for token in label_ids], np.float32)


def _chat_logprobs(label_ids: Sequence[int], reply: Any) -> np.ndarray:
    found = _listed(reply)
    return np.array([found[f"token_id:{token}"] for token in label_ids], np.float32)


def _most_probable(label_ids: Sequence[int], reply: Any) -> np.ndarray:
    if not _listed(reply).keys() >= {f"token_id:{token}" for token in label_ids}:
        raise Unanswered(f"a label is not among the {_MOST} most probable tokens, all that this version of vLLM tells")
    return _chat_logprobs(label_ids, reply)


def _listed(reply: Any) -> dict[str, float]:
    """The logprob of each token that is listed for the first place of the answer."""
    listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["token"]: entry["logprob"] for entry in listed}


def head(name: str, question: Rendered, api: Any) -> Call:
    """See Dialect. A reward model with outputs at every token (Qwen2ForRewardModel) has no route but /pooling."""
    # Without the switch vLLM sends a sigmoid or softmax of them.
    payload: dict[str, Any] = {"model": name, "use_activation": False}
    payload |= {"messages": question.turns} if isinstance(question, Seen) else {"input": question.tolist()}
    if _pools_alone(api):
        return Call("/pooling", payload, _pooled)
    return Call("/classify", payload, lambda reply: sound_outputs(reply["data"][0]["probs"]))


def _pools_alone(api: Any) -> bool:
    try:
        return "/pooling" in api["paths"] and "/classify" not in api["paths"]
    except (KeyError, TypeError):
        return False


def _pooled(reply: Any) -> np.ndarray:
    """The outputs of a sequence, or of the last of its tokens."""
    outputs = reply["data"][0]["data"]
    return sound_outputs(outputs[-1] if isinstance(outputs[-1], list) else outputs)


def _text(reply: Any) -> str:
    return sound_text(_finished(reply)["text"])


def _chat_text(reply: Any) -> str:
    return sound_text(_finished(reply)["message"]["content"])


def _finished(reply: Any) -> Any:
    choice = reply["choices"][0]
    if choice.get("finish_reason") in ("abort", "error"):
        raise ValueError("the answer was broken off")
    return choice
