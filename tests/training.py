"""Run files, data and packed batches of tiny trainings, the same for both engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config.run import BatchSection
from common.data.batching import TrainSequence, pack
from common.state_files import open_state, write_state
from common.trainer import PolicyTrainer, Response, Sampling, SamplingPrompt
from common.types import TrainBatch

ROOT = Path(__file__).parents[1]
# Of torch. Without g++ a graph is still traced and differentiated whole, but not turned into machine code.
COMPILER = "inductor" if shutil.which("g++") else "aot_eager"


def write_data(file: Path) -> Path:
    """Prompts with checkable answers and with checkable instructions, as JSONL."""
    records = [
        {"label": "general_rule", "prompt": [{"role": "user", "content": f"Say {n}."}], "reference": str(n)}
        for n in range(6)
    ] + [
        {
            "label": "instruction_rule",
            "prompt": [{"role": "user", "content": f"At most {n} words."}],
            "reference": [["Length", "Words", f"at most {n} words"]],
        }
        for n in range(2, 8)
    ]
    file.write_text("".join(json.dumps({"id": f"tiny-{n}", **record}) + "\n" for n, record in enumerate(records)))
    return file


def write_run(folder: Path, model: Path, /, **sections: dict[str, Any]) -> Path:
    """A run file for a model folder; `sections` change single keys of its sections."""
    tables: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "steps": 20},
        "backend": {"name": "torch", "threads": 1},
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(write_data(folder / "data.jsonl"))}], "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16},
        "batch": {"row_tokens": 128, "rows_per_microbatch": 2},
        "optimizer": {"learning_rate": 1e-5},
    }
    for name, changes in sections.items():
        tables[name] = {**tables.get(name, {}), **changes}
    file = folder / "run.yaml"
    file.write_text(json.dumps({"include": [str(ROOT / "configs" / "recipe" / "rules.yaml")], **tables}))
    return file


def random_sequences(count: int, vocab_size: int = 320, seed: int = 0, group_size: int = 3) -> list[TrainSequence]:
    """Prompts of 3 to 8 tokens, `group_size` responses of 2 to 12 tokens to each, signed advantages, and weights that
    sum to 1 over all responses' tokens.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, rng.integers(3, 9)).astype(np.int32) for _ in range(0, count, group_size)]
    responses = [rng.integers(0, vocab_size, rng.integers(2, 13)).astype(np.int32) for _ in range(count)]
    return [
        TrainSequence(
            group=index // group_size,
            prompt=prompts[index // group_size],
            token_ids=response,
            sampled=np.ones(len(response), bool),
            sampling_logprobs=rng.normal(-6.0, 1.0, len(response)).astype(np.float32),
            advantage=float(rng.normal()),
            weight=1.0 / sum(map(len, responses)),
        )
        for index, response in enumerate(responses)
    ]


def packed(sequences: Sequence[TrainSequence], row_tokens: int = 32, rows: int = 1, **changes: bool) -> TrainBatch:
    """The sequences as a batch for micro-batches of `rows` rows; `changes` set `packed` and `share_prompts`."""
    return pack(sequences, BatchSection(row_tokens=row_tokens, rows_per_microbatch=rows, **changes))


def response_places(batch: TrainBatch, sequences: Sequence[TrainSequence]) -> list[tuple[int, np.ndarray]]:
    """Row and places [T] of each sequence's response, found by its tokens: responses must differ."""
    found = {}
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max()) + 1):
            places = np.flatnonzero((segments == segment) & batch.sampled[row])
            found[batch.token_ids[row, places].tobytes()] = (row, places)
    return [found[sequence.token_ids.tobytes()] for sequence in sequences]


def sampling_rule(**changes: Any) -> Sampling:
    """Plain sampling at temperature 1 without stop tokens, 24 tokens long, unless told otherwise."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "stop_ids": (), "rows": 64}
    return Sampling(**{**plain, **changes})


def random_prompts(lengths: Sequence[int], group_size: int, max_new_tokens: int = 24) -> list[SamplingPrompt]:
    """One prompt of each length with the numbers of its group; each prompt depends on its place in the list alone."""
    prompts = []
    for index, length in enumerate(lengths):
        rng = np.random.default_rng(index)
        token_ids = rng.integers(3, 259, length).astype(np.int32)
        prompts.append(SamplingPrompt(token_ids, rng.random((group_size, max_new_tokens), np.float32)))
    return prompts


def answered(prompts: Sequence[SamplingPrompt], responses: Sequence[Sequence[Response]]) -> list[TrainSequence]:
    """Prompts with their sampled responses as they would be trained on."""
    return [
        TrainSequence(
            group=group,
            prompt=prompt.token_ids,
            token_ids=response.token_ids,
            sampled=np.ones(len(response.token_ids), bool),
            sampling_logprobs=response.logprobs,
            advantage=1.0,
            weight=1.0,
        )
        for group, (prompt, answers) in enumerate(zip(prompts, responses, strict=True))
        for response in answers
    ]


def save(trainer: PolicyTrainer, folder: Path) -> None:
    """The state of a trainer in one process, complete in a folder that exists."""
    write_state(trainer.snapshot(), folder)


def saved_state(folder: Path, frozen: Collection[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of a saved training state, by `kind/tensor`; frozen: names of tensors that have no moments."""
    with open_state(folder) as saved:
        return {
            f"{kind}/{name}": saved.read(kind, name)
            for kind in saved.kinds
            for name in saved.shapes
            if not (kind.endswith("moment") and name in frozen)
        }
