"""Train the linear heads of the quickstart judge on frozen features of a small language model.

    python configs/quickstart_judge/train_heads.py --model FOLDER [--threads 2] [--out heads.safetensors]

The feature of a (question, response) pair is the final hidden state at the last token of the rendered prompt. The heads
are multinomial logistic regressions without bias, stacked into one matrix `score.weight` (verdicts, then values).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from common.config.judging import JudgeSection
from common.rewards.judges.question import build_question, language
from common.serving.rendering import Renderer
from common.types import Message, Prompt

HERE = Path(__file__).resolve().parent
JUDGES = {"verdicts": "safety_small", "values": "value_small"}
SETTINGS = tuple((shrink, penalty) for shrink in (0.3, 1.0) for penalty in (0.03, 0.1, 0.3, 1.0))
Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class Example(NamedTuple):
    """One judged answer."""

    prompt: Prompt
    response: str
    verdict: str


def read(path: Path) -> list[Example]:
    """Read the examples of a JSONL file, in its order."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Example(Prompt(r["id"], "", tuple(Message(**turn) for turn in r["prompt"])), r["response"], r["verdict"])
        for r in records
    ]


def render(renderer: Renderer, judge: JudgeSection, example: Example) -> list[int]:
    """Token ids of the judge's prompt, as in training."""
    spoken = language(example.prompt)
    asked = build_question(judge.prompt(spoken), example.prompt, example.response.strip(), spoken)
    return np.asarray(renderer(asked)).tolist()


def features(model: Any, batches: Sequence[list[int]], size: int = 16) -> Array:
    """Final hidden state at each prompt's last token; prompts of similar length share a padded batch."""
    order = np.argsort([len(ids) for ids in batches], kind="stable")
    found = np.zeros((len(batches), model.config.hidden_size))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = max(len(batches[i]) for i in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, : len(batches[i])] = torch.tensor(batches[i])
            mask[row, : len(batches[i])] = 1
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        found[rows] = hidden[torch.arange(len(rows)), mask.sum(1) - 1].double().numpy()
    return found


def softmax(logits: Array) -> Array:
    """Probabilities by row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def whitener(x: Array, labels: Ints, shrink: float) -> Array:
    """Inverse root of the features' covariance within the classes, its off-diagonal part shrunk (to 0 at 1)."""
    rest = x.copy()
    for label in np.unique(labels):
        rest[labels == label] -= x[labels == label].mean(axis=0)
    covariance = rest.T @ rest / len(rest)
    covariance = (1 - shrink) * covariance + shrink * np.diag(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(values + 1e-9)) @ vectors.T


def fit(x: Array, labels: Ints, classes: int, shrink: float, penalty: float, steps: int = 200) -> Array:
    """Logistic regression without bias, classes weighted equally, by Newton steps with a fixed bound on the Hessian.

    The features are whitened but not centred, so that the nearly constant ones do the work of a bias, and the whitening
    is folded into the returned weights [classes, columns].
    """
    white = whitener(x, labels, shrink)
    z = x @ white
    weight = (len(labels) / classes / np.bincount(labels, minlength=classes))[labels][:, None] / len(labels)
    target = np.eye(classes)[labels]
    curvature = np.linalg.inv(0.5 * (z * weight).T @ z + penalty * np.eye(z.shape[1]))
    weights = np.zeros((z.shape[1], classes))
    for _ in range(steps):
        chance = softmax(z @ weights)
        step = curvature @ (z.T @ ((chance - target) * weight) + penalty * weights)
        weights -= step
        if np.abs(step).max() < 1e-5:
            break
    return (white @ weights).T


def folds(examples: Sequence[Example], count: int, seed: int) -> Ints:
    """A fold number for each example; the answers to one question stay together."""
    asked = [e.prompt.messages[-1].content for e in examples]
    questions = sorted(set(asked))
    numbers = np.random.default_rng(seed).permutation(len(questions)) % count
    fold = dict(zip(questions, numbers.tolist(), strict=True))
    return np.array([fold[question] for question in asked])


def choose(x: Array, labels: Ints, fold: Ints, classes: int) -> tuple[float, float]:
    """Shrinkage and penalty with the lowest cross-validated log loss."""
    losses = []
    for setting in SETTINGS:
        chance = np.zeros((len(x), classes))
        for k in np.unique(fold):
            chance[fold == k] = softmax(x[fold == k] @ fit(x[fold != k], labels[fold != k], classes, *setting).T)
        losses.append(float(-np.log(chance[np.arange(len(x)), labels]).mean()))
        right = (chance.argmax(axis=1) == labels).mean()
        print(f"  {setting}: log loss {losses[-1]:.3f}, accuracy {right:.3f}", flush=True)
    return SETTINGS[int(np.argmin(losses))]


def report(name: str, names: Sequence[str], weights: Array, x: Array, labels: Ints) -> None:
    """Print accuracy beside the majority class, by class, and the confusion table."""
    guess = (x @ weights.T).argmax(axis=1)
    table = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(table, (labels, guess), 1)
    majority = np.bincount(labels).max() / len(labels)
    print(f"{name}, held out: accuracy {(guess == labels).mean():.3f} on {len(x)}, majority class {majority:.3f}")
    print("  " + "".join(f"{label.split()[-1][:9]:>11}" for label in names) + "   right")
    for label, row in zip(names, table, strict=True):
        print("  " + "".join(f"{n:11d}" for n in row) + f"   {row[names.index(label)] / row.sum():.2f}  {label}")


def train(name: str, args: argparse.Namespace, renderer: Renderer, model: Any) -> Array:
    """Fit and report one head; its weights are rounded as they are stored."""
    judges = YAML(typ="safe", pure=True).load(HERE / "judge.yaml")["rewards"]["judges"]
    judge = JudgeSection.model_validate(judges[JUDGES[name]])
    names = list(judge.read_out.verdicts)
    sets = [read(HERE / f"{name}.jsonl"), read(HERE / f"{name}_heldout.jsonl")]
    start = time.perf_counter()
    prompts = [[render(renderer, judge, e) for e in examples] for examples in sets]
    x, held = (features(model, p) for p in prompts)
    seconds = (time.perf_counter() - start) / sum(map(len, prompts))
    tokens = np.mean([len(ids) for p in prompts for ids in p])
    print(
        f"{name}: {len(x)} + {len(held)} examples, {tokens:.0f} tokens a prompt, {seconds:.3f} s a feature", flush=True
    )
    labels, truth = (np.array([names.index(e.verdict) for e in examples]) for examples in sets)
    shrink, penalty = choose(x, labels, folds(sets[0], 5, args.seed), len(names))
    exact = fit(x, labels, len(names), shrink, penalty)
    exact -= exact.mean(axis=0)
    stored = exact.astype(np.float16).astype(np.float64)
    changed = ((held @ stored.T).argmax(1) != (held @ exact.T).argmax(1)).sum()
    print(f"  shrink {shrink:g}, penalty {penalty:g}; rounding to float16 changes {changed} held-out verdicts")
    report(name, names, stored, held, truth)
    return stored


def main() -> None:
    """Train both heads and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=HERE / "heads.safetensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    renderer = Renderer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    weights = np.concatenate([train(name, args, renderer, model) for name in JUDGES])
    stored = np.ascontiguousarray(weights, dtype=np.float16)  # safetensors writes other memory orders scrambled
    save_file({"score.weight": stored}, args.out)
    if not np.array_equal(load_file(args.out)["score.weight"], stored):
        raise RuntimeError(f"{args.out} does not hold what was written")
    print(f"wrote {args.out}: score.weight {list(weights.shape)} float16")


if __name__ == "__main__":
    main()
