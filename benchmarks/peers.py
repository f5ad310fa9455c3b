"""TRL's GRPO update on the cases of `train_step.py`, in the same run and form, so that the two can be compared.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/peers.py 0.5b [--recompute full none] [--updates 5] [--rows 16] [--liger]

TRL trains by its own loop; only what it would have sampled is given: random tokens, advantages and old logprobs. fp32
master weights, bf16 autocast, AdamW fused, its chunked logprobs. `full` is its gradient checkpointing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_step


def main() -> None:
    """Measure every case, each in a process of its own, or one when called for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=train_step.CASES)
    parser.add_argument("--recompute", nargs="+", default=["full"], choices=["none", "full"])
    parser.add_argument("--rows", type=int, help="of a micro-batch, in place of the case's own")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels, which must be installed")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.here:
        measure(arguments)
        return
    print(train_step.HEAD, flush=True)
    for case in arguments.cases:
        for recompute in arguments.recompute:
            words = [case, "--recompute", recompute, "--updates", str(arguments.updates), "--here"]
            words += ["--rows", str(arguments.rows)] if arguments.rows else []
            words += ["--liger"] if arguments.liger else []
            subprocess.run([sys.executable, __file__, *words], check=False)


def measure(arguments: argparse.Namespace) -> None:
    """One case in this process."""
    import torch

    [name], [recompute] = arguments.cases, arguments.recompute
    case = train_step.CASES[name]
    rows = arguments.rows or case.rows_per_microbatch
    case = case._replace(rows_per_microbatch=rows)
    with tempfile.TemporaryDirectory() as folder:
        parameters = train_step.write_model(Path(folder), train_step.SHAPES[case.shape])
        ends = trained(case, Path(folder), recompute == "full", arguments.updates, arguments.liger)
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    engine = "trl+lk" if arguments.liger else "trl"
    train_step.show(name, case, engine, recompute, parameters, seconds, memory, ends[0])


def trained(case: train_step.Case, model: Path, checkpointing: bool, updates: int, liger: bool) -> list[float]:
    """Train; returns when each update ended, in seconds from the start of the first."""
    import pyarrow
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    batches = microbatches(case)
    began, ends = 0.0, []

    class Given(GRPOTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> Any:
            return batches[self._step % len(batches)]

    class Clock(TrainerCallback):  # type: ignore[misc]
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
        use_liger_kernel=liger,
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
    import torch

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
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"word": 0, "<end>": 1}, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    main()
