"""A run on a Ray cluster of two nodes: a replica that dies comes back, and who ended the trainer is said."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.launch.judged_run import judged_run
from tests.launch.ray_clusters import launched, programs, ray_cluster
from tests.runs import read_lines, saved_steps


def test_a_replica_comes_back_and_a_dead_trainer_is_named(tmp_path: Path) -> None:
    run_file = judged_run(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2", run={"steps": 100_000})
    folder = tmp_path / "run"
    with ray_cluster() as address, launched(address, run_file, "--restarts", "0") as job:
        job.until(lambda: saved_steps(folder))
        found = {"PYTHONPATH": str(tmp_path / "programs")}
        replicas = programs("vllm.entrypoints.openai.api_server", **found)
        trainers = programs("safework_torch.main", run_file, WORLD_SIZE="2")
        assert len(replicas) == len(trainers) == 2 and job.out.count("] ready: taste at ") == 2
        assert {each.environ()["LOCAL_WORLD_SIZE"] for each in trainers} == {"1"}  # each on a node of its own

        replicas[0].kill()
        job.until(lambda: job.out.count("] ready: taste at ") == 3)
        assert re.search(
            r"^server taste [01]: ended after \d+ s with exit status 1.*; starting it again$", job.out, re.M
        )
        steps = len(read_lines(folder / "metrics.jsonl"))
        job.until(lambda: len(read_lines(folder / "metrics.jsonl")) > steps)

        [victim] = programs("safework_torch.main", run_file, RANK="1")
        begun = time.monotonic()
        victim.kill()
        status, error = job.ended()
        assert status == 1 and time.monotonic() - begun < 60
        assert re.fullmatch(
            r"error: trainer 1 of 2 \(\S+\): killed by signal 9 \(Killed\) after \d+ s\. The same command goes on from "
            r"the run's newest checkpoint\.\n",
            error,
        )
        assert programs("vllm.entrypoints.openai.api_server", **found) == []
        assert programs("safework_torch.main", run_file, RANK="0") == []
    scored = [score for record in read_lines(folder / "rollouts.jsonl") for score in record["scores"].values()]
    assert len(set(scored)) > 3  # the classifier looked at each response
