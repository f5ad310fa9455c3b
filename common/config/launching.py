"""The section of how a server is started, and what of an engine's options and variables changes its model's answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic import Field, model_validator

from common.config.section import Fraction, PositiveFloat, PositiveInt, Section

# Memory, batches, processes and logs. Any other option is taken to change answers, or an engine's next one would be
# missed; so are the short forms of these, which are not worth telling from others. --enforce-eager is not among them:
# what vLLM compiles rounds at other places, by 0.015 of a label's probability in bf16 (benchmarks/README.md).
_HARMLESS = re.compile(
    "gpu-memory-utilization|mem-fraction-static|kv-cache-memory-bytes|swap-space|cpu-offload-gb|download-dir|"
    "max-num-seqs|max-num-batched-tokens|max-running-requests|max-total-tokens|max-prefill-tokens|"
    "enable-chunked-prefill|no-enable-chunked-prefill|chunked-prefill-size|enable-mixed-chunk|"
    "enable-prefix-caching|no-enable-prefix-caching|disable-radix-cache|disable-cuda-graph|"
    "cuda-graph-max-bs|cuda-graph-bs|skip-server-warmup|scheduling-policy|schedule-policy|"
    "schedule-conservativeness|async-scheduling|no-async-scheduling|api-server-count|tokenizer-worker-num|"
    "distributed-executor-backend|nccl-port|dist-timeout|watchdog-timeout|base-gpu-id|gpu-id-step|"
    "data-parallel-size|dp-size|pipeline-parallel-size|pp-size|log-level|log-level-http|log-requests|"
    "log-requests-level|uvicorn-log-level|disable-uvicorn-access-log|disable-log-stats|disable-log-requests|"
    "enable-log-requests|no-enable-log-requests|max-log-len|decode-log-interval|enable-metrics|show-time-cost"
)
# Likewise for variables of the environment.
_HARMLESS_VARIABLE = re.compile(
    "CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|OMP_NUM_THREADS|HF_HOME|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|TMPDIR|"
    "VLLM_CPU_KVCACHE_SPACE|VLLM_CPU_OMP_THREADS_BIND|VLLM_CACHE_ROOT|VLLM_HOST_IP|VLLM_PORT|VLLM_LOGGING_[A-Z_]+|"
    "VLLM_NO_USAGE_STATS|VLLM_DO_NOT_TRACK|VLLM_SERVER_DEV_MODE|SGLANG_CACHE_DIR|SGLANG_HOST_IP|SGLANG_PORT|"
    "SGLANG_LOG_[A-Z_]+|NCCL_[A-Z_]*(DEBUG|IFNAME|HCA)[A-Z_]*"
)
_OPTION = re.compile(r"--?[A-Za-z]")  # -1 is a value
_NAME_ENDS = re.compile(r"[=.\s]")
SECRET = re.compile(r"((key|passw(or)?d|secret|credential|authorization)s?|token)$", re.IGNORECASE)
PASSWORD = re.compile(r"://[^/\s]*@")


def shaping_options(words: Iterable[str]) -> list[str]:
    """Those words of an engine's command line that may change what its model answers, as they are."""
    kept, shapes = [], True
    for word in words:
        if _OPTION.match(word):
            shapes = _HARMLESS.fullmatch(_name(word)) is None
        if shapes:
            kept.append(word)
    return kept


def _name(word: str) -> str:
    """The option that a word sets: `hf-overrides` of `--hf_overrides.rope_theta=1`."""
    return _NAME_ENDS.split(word.lstrip("-"), maxsplit=1)[0].replace("_", "-")


def shaping_variables(environment: Mapping[str, str]) -> list[str]:
    """Those variables that may change what a model answers, as NAME=VALUE."""
    return [f"{name}={value}" for name, value in sorted(environment.items()) if not _HARMLESS_VARIABLE.fullmatch(name)]


class LaunchSection(Section):
    """How `safework serve` starts a server: one process for each of its urls on this machine, which give host and port.

    python: the Python of the environment that holds the engine, such as `.venv-vllm/bin/python`. memory_fraction: of
    each GPU's memory; null leaves the engine's own default. options: further words of the engine's command line, as
    they are. environment: variables beside those of the shell, which the server inherits. What of both may change what
    the model answers (`shaping`) is part of what it is called in records. Both are kept with a run's config, so secrets
    belong in the shell. ready_s: seconds until it must be healthy.
    """

    python: str
    tensor_parallel: PositiveInt = 1
    memory_fraction: Fraction | None = None
    options: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    ready_s: PositiveFloat = 1800.0

    @property
    def shaping(self) -> list[str]:
        """The variables and options that may change what the model answers."""
        return [*shaping_variables(self.environment), *shaping_options(self.options)]

    @model_validator(mode="after")
    def _no_secrets(self) -> LaunchSection:
        named = [_name(word) for word in self.options if _OPTION.match(word)] + list(self.environment)
        secret = next((name for name in named if SECRET.search(name)), None)
        if secret is None and any(PASSWORD.search(word) for word in (*self.options, *self.environment.values())):
            secret = "the password of an address"
        if secret is not None:
            raise ValueError(
                f"{secret} would be kept with every run and its scores. Leave it out here, and set the engine's "
                "variable for it in the shell (VLLM_API_KEY, HF_TOKEN)"
            )
        return self

    @model_validator(mode="after")
    def _can_be_started(self) -> LaunchSection:
        words = (self.python, *self.options, *self.environment, *self.environment.values())
        if any("\0" in word or any("\ud800" <= sign <= "\udfff" for sign in word) for word in words):
            raise ValueError(
                "holds a word with a null byte or half a character, which no process can be given. Correct it"
            )
        if any(not name or "=" in name for name in self.environment):
            raise ValueError("a variable of environment needs a name without =. Correct it")
        return self

    @model_validator(mode="after")
    def _all_options_are_here(self) -> LaunchSection:
        if any(_OPTION.match(word) and _name(word) == "config" for word in self.options):
            raise ValueError(
                "--config names a file, and records would not show what its options were. Write them in options"
            )
        return self
