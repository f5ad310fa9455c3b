"""TRL's GRPO update: its own loop, with what it would have sampled given. fp32 master weights, bf16 autocast, fused
AdamW, its chunked logprobs.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import torch
import train_step
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def trained(case: train_step.Case, checkpointing: bool, updates: int) -> tuple[list[float], float]:
    """Train; returns when each update ended, in seconds from the start of the first, and the peak of memory in GiB."""
    with TemporaryDirectory() as folder:
        train_step.write_model(Path(folder), train_step.SHAPES[case.shape])
        ends = ends_of_updates(case, Path(folder), checkpointing, updates)
    return ends, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def ends_of_updates(case: train_step.Case, model: Path, checkpointing: bool, updates: int) -> list[float]:
    """The training itself, from a model's folder."""
    batches = microbatches(case)
    began, ends = 0.0, []

    class Given(GRPOTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return batches[self._step % len(batches)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = began or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter() - began)

    words = pyarrow.table({"prompt": ["word"] * 4 * case.sequences * (updates + 2)})
    arguments = GRPOConfig(
        output_dir=str(model / "run"),
        per_device_train_batch_size=case.rows_per_microbatch,
        gradient_accumulation_steps=len(batches),
        num_generations=8,
        max_completion_length=case.response,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=updates + 2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Given(
        model=str(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset(words, fingerprint="words"),
        processing_class=tokenizer(),
        callbacks=[Clock()],
    )
    trainer.train()
    return ends


def microbatches(case: train_step.Case) -> list[dict[str, Any]]:
    """What TRL would have sampled, a micro-batch each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Any:
        vocabulary = min(100_000, train_step.SHAPES[case.shape]["vocab_size"])
        return torch.randint(2, vocabulary, (case.rows_per_microbatch, count), generator=generator)

    batches = []
    for _ in range(case.sequences // case.rows_per_microbatch):
        prompt, completion = tokens(case.prompt), tokens(case.response)
        batch = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": completion,
            "completion_mask": torch.ones_like(completion),
            "advantages": torch.randn(case.rows_per_microbatch, generator=generator),
            "old_per_token_logps": -12.0 + 0.1 * torch.randn(completion.shape, generator=generator),
            "num_items_in_batch": torch.tensor(case.sequences * case.response),
        }
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


def tokenizer() -> Any:
    """One word: TRL asks for a tokenizer, and nothing is tokenised."""
    words = Tokenizer(WordLevel({"word": 0, "<end>": 1}, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
