"""One policy update on GPUs: tokens a second, MFU and peak memory, both engines in turns.

    python benchmarks/train_step.py 0.5b 1.5b 0.6b-16k [--engines torch jax] [--recompute none dots full] [--updates 5]
    torchrun --nproc-per-node 2 benchmarks/train_step.py 0.5b --engine torch --recompute none

Random weights of a model's shapes, random tokens, PPO-clip with old logprobs given, fp32 master weights, bf16 products,
AdamW. Seconds are those of `updates` whole updates after two uncounted ones. MFU counts 6 x parameters x tokens and
causal attention, without what is computed again, of 989 TFLOP/s; peak memory is the allocator's own figure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import device_time
import numpy as np

from common.config import LoadedConfig, load_config
from common.config.run import BatchSection
from common.data.batching import TrainSequence, pack
from common.types import TrainBatch
from safework_jax.config import JaxSection

HEAD = "case             engine recompute rows  tokens/s    MFU    GiB first s"
PEAK_FLOPS = 989e12  # of an H100, dense bf16
PROFILED = 3  # updates
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "rope_theta": 1e6}
_QWEN3 = {**_QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2.5-1.5b": _QWEN2
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3-0.6b": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "qwen2.5-7b": _QWEN2
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064},
}


class Case(NamedTuple):
    """A model's shapes, and the sequences of an update: how many, and tokens of prompt, response and row."""

    shape: str
    sequences: int
    prompt: int
    response: int
    row_tokens: int
    rows_per_microbatch: int


CASES = {
    "0.5b": Case("qwen2.5-0.5b", 64, 256, 768, 1024, 16),
    "0.5b-packed": Case("qwen2.5-0.5b", 64, 256, 768, 4096, 4),
    "1.5b": Case("qwen2.5-1.5b", 64, 256, 768, 1024, 16),
    "0.6b-16k": Case("qwen3-0.6b", 4, 1024, 15360, 16384, 1),
    "0.6b-16k-packed": Case("qwen3-0.6b", 16, 1024, 3072, 16384, 1),
    "7b-16k": Case("qwen2.5-7b", 4, 1024, 15360, 16384, 2),
}


def main() -> None:
    """Measure every case on every engine, each in a process of its own, or one when called for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--engines", nargs="+", default=["torch", "jax"], choices=["torch", "jax"])
    parser.add_argument("--engine", choices=["torch", "jax"], help="measure here, with this one")
    parser.add_argument("--recompute", nargs="+", default=["none"], choices=["none", "dots", "full"])
    parser.add_argument("--rows", type=int, help="of a micro-batch, in place of the case's own")
    parser.add_argument("--sequences", type=int, help="of an update, in place of the case's own")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="more of the config, key=value")
    parser.add_argument("--profile", action="store_true", help="what the GPU does in three more updates")
    arguments = parser.parse_args()
    if arguments.engine:
        measure(arguments)
        return
    print(HEAD, flush=True)
    for case in arguments.cases:
        for recompute in arguments.recompute:
            for engine in arguments.engines:
                words = [case, "--engine", engine, "--recompute", recompute, "--updates", str(arguments.updates)]
                words += ["--rows", str(arguments.rows)] if arguments.rows else []
                words += ["--sequences", str(arguments.sequences)] if arguments.sequences else []
                words += ["--profile"] if arguments.profile else []
                subprocess.run([sys.executable, __file__, *words, "--set", *arguments.set], check=False)


def measure(arguments: argparse.Namespace) -> None:
    """One case on one engine in this process, or in all that a launcher has started."""
    [name], [recompute] = arguments.cases, arguments.recompute
    case = CASES[name]
    if arguments.rows:
        case = case._replace(rows_per_microbatch=arguments.rows)
    if arguments.sequences:
        case = case._replace(sequences=arguments.sequences)
    if arguments.engine == "torch":
        from safework_torch.main import open_trainer
        from safework_torch.processes import open_team
    else:
        from safework_jax.main import open_trainer
        from safework_jax.processes import open_team
    with tempfile.TemporaryDirectory() as folder, open_team(600.0) as team:
        model = Path(folder) / "model"
        if team.leads:
            write_model(model, SHAPES[case.shape])
        model = team.exchange(model, "the folder of the model")[0]
        loaded = load(case, arguments.engine, recompute, model, arguments.set)
        trainer = open_trainer(loaded, model, None)
        batch = random_batch(case, loaded.config.batch)
        started = time.perf_counter()
        trainer.update(batch, 1e-6)
        first = time.perf_counter() - started
        trainer.update(batch, 1e-6)
        started = time.perf_counter()
        for _ in range(arguments.updates):
            trainer.update(batch, 1e-6)
        seconds = (time.perf_counter() - started) / arguments.updates
        peak = trainer.peak_memory_gib()
        spans = profiled(trainer, batch, arguments.engine) if arguments.profile else []
        section = loaded.engine
        cards = section.mesh.num_devices if isinstance(section, JaxSection) else len(team.places)
    if team.leads:
        show(name, case, arguments.engine, recompute, seconds, peak, first, cards)
        if spans:
            device_time.show(spans, PROFILED)


def show(
    name: str,
    case: Case,
    engine: str,
    recompute: str,
    seconds: float,
    gib: float,
    first: float,
    cards: int = 1,
) -> None:
    """A line under HEAD, of updates that take so many seconds each, the first one `first`."""
    tokens = case.sequences * (case.prompt + case.response)
    mfu = flops(case) / seconds / PEAK_FLOPS / cards
    print(
        f"{name:16s} {engine:6s} {recompute:9s} {case.rows_per_microbatch:4d} {tokens / seconds:9.0f} {mfu:6.1%} "
        f"{gib:6.1f} {first:7.1f}",
        flush=True,
    )


def flops(case: Case) -> float:
    """Of one update: products forward and backward, and causal attention."""
    parameters = sum(parameter.numel() for parameter in _model(SHAPES[case.shape], "meta").parameters())
    shape, length = SHAPES[case.shape], case.prompt + case.response
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    width = shape["num_attention_heads"] * head_dim
    attention = 6 * case.sequences * length**2 * width * shape["num_hidden_layers"]
    return 6 * parameters * case.sequences * length + attention


def _model(shape: dict[str, Any], device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, max_position_embeddings=32768, bos_token_id=0, eos_token_id=1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model folder of random weights, in bf16."""
    import torch

    model = _model(shape, "cuda" if torch.cuda.is_available() else "cpu")
    model.cpu().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def load(case: Case, engine: str, recompute: str, model: Path, more: list[str]) -> LoadedConfig:
    """The quickstart's experiment with this model and these rows."""
    return load_config(
        ["configs/quickstart.yaml"],
        [
            f"backend.name={engine}",
            f"backend.recompute={recompute}",
            "backend.dtype=bfloat16",
            "backend.threads=0",
            "backend.torch.compile=true",
            "batch.share_prompts=false",
            f"model.path={model}",
            f"batch.row_tokens={case.row_tokens}",
            f"batch.rows_per_microbatch={case.rows_per_microbatch}",
            "loss.old_logprobs=sampler",
            f"data.max_prompt_tokens={case.prompt}",
            f"rollout.max_new_tokens={case.response}",
            *more,
        ],
    )


def random_batch(case: Case, section: BatchSection, seed: int = 0) -> TrainBatch:
    """Random tokens, advantages and sampling logprobs, which are the old ones too."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(2, 100_000, count).astype(np.int32)

    sequences = [
        TrainSequence(
            group=index // 8,
            prompt=tokens(case.prompt),
            token_ids=tokens(case.response),
            sampled=np.ones(case.response, bool),
            sampling_logprobs=rng.normal(-12.0, 0.1, case.response).astype(np.float32),
            advantage=float(rng.normal()),
            weight=1.0 / (case.sequences * case.response),
        )
        for index in range(case.sequences)
    ]
    batch = pack(sequences, section)
    return TrainBatch(**{**vars(batch), "old_logprobs": batch.sampling_logprobs})


def profiled(trainer: Any, batch: TrainBatch, engine: str) -> list[device_time.Span]:
    """What the GPU of this process does in a few updates."""

    def updates() -> None:
        for _ in range(PROFILED):
            trainer.update(batch, 1e-6)

    return device_time.on_torch(updates) if engine == "torch" else device_time.on_jax(updates)


if __name__ == "__main__":
    main()
