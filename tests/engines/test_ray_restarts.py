"""What a Ray cluster does with a trainer that dies more than once: all of it again, from the newest checkpoint."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.launch.ray_clusters import launched, programs, ray_cluster
from tests.runs import lowercase_run, read_lines, saved_steps


def test_the_trainer_goes_on_as_a_whole_and_a_signal_saves_it(tmp_path: Path) -> None:
    sections = {"run": {"steps": 100_000}, "batch": {"rows_per_microbatch": 4}, "evaluation": {"at_ends": False}}
    run_file, folder = lowercase_run(tmp_path, **sections), tmp_path / "run"
    with ray_cluster() as address, launched(address, run_file, "--restarts", "1") as job:
        job.until(lambda: saved_steps(folder))
        [victim] = programs("safework_torch.main", RANK="1")
        victim.kill()
        job.until(lambda: "resuming after step" in job.out)
        assert re.search(
            r"^trainer 1 of 2 \(\S+\): killed by signal 9 .* again \(1 times left\)$", job.out, re.MULTILINE
        )
        steps = len(read_lines(folder / "metrics.jsonl"))
        job.until(lambda: len(read_lines(folder / "metrics.jsonl")) > steps)
        job.process.send_signal(signal.SIGTERM)
        assert job.ended() == (130, "stopping after this step (Ctrl-C: at once, losing it)\n")
        assert programs("safework_torch.main", WORLD_SIZE="2") == []
    assert saved_steps(folder)[-1] == len(read_lines(folder / "metrics.jsonl"))
    assert f"stopped and saved after step {saved_steps(folder)[-1]} of 100000" in job.out
