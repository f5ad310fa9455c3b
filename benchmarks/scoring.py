"""How fast judges on a server are asked: a stand-in server in a process of its own answers after a given time.

    python benchmarks/scoring.py [--scorings 5000] [--concurrent 256] [--seconds 0.5]

Three passes of the value judge over as many different answers: against the slow stand-in, whose ideal is concurrent /
seconds; from the cache that this has filled; and against one that answers at once, which leaves the client's own
maximum. A scoring is all of it: the judge's prompt, tokens, HTTP, the reply and the score.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from aiohttp import web

from common.config.judging import JudgeSection
from common.config.load import load_config
from common.config.servers import ServerSection
from common.data.chat import transcript
from common.data.model_folder import model_folder
from common.rewards.judges.judge import Judge
from common.serving.answer_cache import AnswerCache
from common.serving.cached import CachedModel
from common.serving.served import ServedModel
from common.types import Message, Missing, Prompt, Sample

MODEL = "embedded:smollm2"
WARM_UP = 500  # scorings, after which connections stand and memory is looked at


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorings", type=int, default=5000)
    parser.add_argument("--concurrent", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5)
    words = parser.parse_args()
    config = load_config([Path("configs/quickstart.yaml"), Path("configs/judge/value.yaml")]).config
    section = config.rewards.judges["value"]
    asked = samples(WARM_UP + words.scorings)
    with tempfile.TemporaryDirectory() as folder:
        with judging(section, words.seconds, words.concurrent, Path(folder) / "slow.sqlite") as judge:
            score(judge, asked[:WARM_UP])
            before = resident_mb()
            rate = timed(judge, asked[WARM_UP:])
            ideal = words.concurrent / words.seconds
            print(f"stand-in of {words.seconds} s: {rate:.0f} scorings/s, {rate / ideal:.2f} of the ideal {ideal:.0f}")
            print(f"memory: {before:.0f} MB before, {resident_mb():.0f} MB after {words.scorings} scorings")
            print(f"from the cache: {timed(judge, asked[WARM_UP:]):.0f} scorings/s")
        with judging(section, 0.0, words.concurrent, Path(folder) / "quick.sqlite") as judge:
            score(judge, asked[:WARM_UP])
            print(f"stand-in that answers at once: {timed(judge, asked[WARM_UP:]):.0f} scorings/s")


def samples(count: int) -> list[Sample]:
    """As many different answers to one question."""
    prompt = Prompt("p", "value", (Message("user", "Should I tell my friend that I broke the vase?"),), None)
    texts = (
        f"Tell the truth, and offer to pay {number} coins for it. " + "It matters to them. " * 8
        for number in range(count)
    )
    return [Sample(prompt, transcript(text, opened=False)) for text in texts]


@contextmanager
def judging(section: JudgeSection, seconds: float, concurrent: int, cache: Path) -> Iterator[Judge]:
    """A judge whose server answers after so many seconds, behind a new cache."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs, seconds), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    server = ServerSection(engine="vllm", model=MODEL, urls=[url], concurrency=concurrent)
    with closing(CachedModel(ServedModel("stand_in", server), AnswerCache(cache))) as model:
        yield Judge("value", section, model)
    process.terminate()
    process.join()


def score(judge: Judge, asked: Sequence[Sample]) -> None:
    """Have every sample scored; none may be missing."""
    assert not any(isinstance(score, Missing) for score in judge.score(asked))


def timed(judge: Judge, asked: Sequence[Sample]) -> float:
    """Scorings per second."""
    began = time.perf_counter()
    score(judge, asked)
    return len(asked) / (time.perf_counter() - began)


def resident_mb() -> float:
    """Of this process."""
    return psutil.Process(os.getpid()).memory_info().rss / 1e6


def serve(told: Connection, seconds: float) -> None:
    """Be the stand-in, and tell the port. It speaks as much of vLLM as label probabilities need."""
    properties = {"logprob_token_ids": {}}
    fixed = {
        "/v1/models": {"data": [{"id": MODEL, "root": str(model_folder(MODEL))}]},
        "/openapi.json": {"components": {"schemas": {"CompletionRequest": {"properties": properties}}}},
    }

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(fixed[request.path])

    async def complete(request: web.Request) -> web.Response:
        labels = (await request.json())["logprob_token_ids"]
        await asyncio.sleep(seconds)
        found = {f"token_id:{token}": -1.0 for token in labels}
        return web.json_response({"choices": [{"logprobs": {"top_logprobs": [found]}}]})

    async def run() -> None:
        app = web.Application()
        app.add_routes([*(web.get(path, describe) for path in fixed), web.post("/v1/completions", complete)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        told.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()
