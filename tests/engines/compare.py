"""The same judges through two servers: how far their answers lie apart on 200 pairs.

    python tests/engines/compare.py vllm=http://127.0.0.1:8001 sglang=http://127.0.0.1:8002 --model FOLDER
    python tests/engines/compare.py vllm=http://127.0.0.1:8003 sglang=http://127.0.0.1:8004 --model FOLDER --head

FOLDER is what both serve, under its own path as name. Without --head, the value and knowledge judges of `configs/judge`
are asked for label probabilities; with it, the quickstart's judges for those of their heads.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.config.servers import ServerSection
from common.serving.served import ServedModel
from tests.engines.pairs import head_probabilities, judge, label_probabilities, questions

CLEAR = 0.1  # a verdict that is further ahead than this with either server must be the same with both


def answers(engine: str, url: str, folder: str, head: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """By judge what the server gave, and what it wrote for the safety judge."""
    section = ServerSection.model_validate({"engine": engine, "model": folder, "urls": [url], "concurrency": 64})
    with closing(ServedModel(engine, section)) as model:
        print(f"{engine}: {model.identity}")
        if head:
            return head_probabilities(model), []
        found = {name: label_probabilities(model, name) for name in ("value", "knowledge")}
        return found, [str(answer.value) for answer in model.generate(questions(judge("safety")), 16)]


def lead(values: np.ndarray) -> np.ndarray:
    """[N]: how far the first of each row [N L] is ahead of the second."""
    ordered = np.sort(values, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def main() -> None:
    """Ask both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs=2, metavar="ENGINE=URL")
    parser.add_argument("--model", required=True)
    parser.add_argument("--head", action="store_true")
    words = parser.parse_args()
    found = []
    for server in words.servers:
        engine, url = server.split("=", 1)
        started = time.perf_counter()
        found.append(answers(engine, url, words.model, words.head))
        print(f"{engine}: {time.perf_counter() - started:.1f} s")
    (first, first_texts), (second, second_texts) = found
    for name, values in first.items():
        apart = np.abs(values - second[name])
        clear = (lead(values) > CLEAR) | (lead(second[name]) > CLEAR)
        same = values.argmax(axis=1) == second[name].argmax(axis=1)
        print(
            f"{name}: {len(values)} pairs, mean difference {apart.mean():.5f}, max {apart.max():.5f}, "
            f"same verdict {same[clear].sum()} of {clear.sum()} clear ones, {same.sum()} of all"
        )
    if first_texts:
        equal = sum(a == b for a, b in zip(first_texts, second_texts, strict=True))
        print(f"greedy text of the safety judge: equal for {equal} of {len(first_texts)}")


if __name__ == "__main__":
    main()
