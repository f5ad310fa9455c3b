"""SGLang's HTTP dialect, 0.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.config.section import ConfigError
from common.serving.dialect import Rendered, Seen, sound_outputs, sound_text
from common.serving.http import Call

MODELS, API = "/get_model_info", "/openapi.json"


# What is not said here, a server may take from the model's own generation_config.json.
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def identity(reply: Any) -> tuple[str, str]:
    """See Dialect; SGLang has no name beside the folder or name that it loaded, and a version of the weights."""
    return reply["model_path"], str(reply.get("weight_version", "default"))


def generate(name: str, question: Rendered, max_tokens: int) -> Call:
    """See Dialect."""
    return Call("/generate", _asked(question, max_tokens), _text)


def label_logprobs(name: str, question: Rendered, label_ids: Sequence[int], api: Any) -> Call:
    """See Dialect."""
    payload = _asked(question, 1) | {"return_logprob": True, "token_ids_logprob": list(label_ids)}

    def read(reply: Any) -> np.ndarray:
        found = {token: logprob for logprob, token, _ in reply["meta_info"]["output_token_ids_logprobs"][0]}
        return np.array([found[token] for token in label_ids], np.float32)

    return Call("/generate", payload, read)


def head(name: str, question: Rendered, api: Any) -> Call:
    """See Dialect."""
    return Call("/classify", _prompt(question), lambda reply: sound_outputs(reply["embedding"]))


def _asked(question: Rendered, max_tokens: int) -> dict[str, Any]:
    return {**_prompt(question), "sampling_params": {"max_new_tokens": max_tokens, **_GREEDY}}


def _prompt(question: Rendered) -> dict[str, Any]:
    """Raises ConfigError for images where the chat template has no place for any, or SGLang, which lets the tokenizer
    add its own tokens there, would add others than the template's.
    """
    if isinstance(question, Seen):
        if question.text is None:
            raise ConfigError(
                "SGLang cannot be asked about images by a judge's model: its chat template has no place for them, or "
                "its tokenizer puts tokens around each text that the template does not have. Choose a model for "
                "images, or serve it by vLLM."
            )
        return {"text": question.text, "image_data": question.images}
    return {"input_ids": question.tolist()}


def _text(reply: Any) -> str:
    reason = reply["meta_info"].get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise ValueError("the answer was broken off")
    return sound_text(reply["text"])
