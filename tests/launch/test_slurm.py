"""The SLURM job file, run by a real shell: servers, two trainer processes, and the signal before its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.common.serving.stand_in_engine import write_programs
from tests.common.serving.test_serve import free_ports, model_folder
from tests.e2e.test_teams import run_of
from tests.launch.stand_in_slurm import write_commands
from tests.runs import DEADLINE, ENVIRONMENT, read_lines, safework, saved_steps, wait_until
from tests.training import ROOT


def job_file(folder: Path, run_file: Path, *words: str) -> Path:
    """The job file of a run of two processes on one node."""
    out = folder / "job.sbatch"
    options = (
        "--on",
        "slurm",
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--processes-per-node",
        "2",
        "--time",
        "1:00:00",
    )
    written = safework("launch", run_file, *options, "--out", out, *words)
    assert written.returncode == 0 and f"sbatch {out}" in written.stdout, written
    subprocess.run(["bash", "-n", str(out)], check=True)
    return out


def submitted(folder: Path, file: Path, number: int) -> subprocess.Popen[str]:
    """The job as the scheduler starts it."""
    variables = {
        **ENVIRONMENT,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid() * 10 + number),
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "TEST_SCONTROL": str(folder / "scontrol.log"),
        "TEST_STEPS": str(folder / "steps"),
    }
    file.write_text(file.read_text().replace(f"cd {ROOT}", f"cd {folder}"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["bash", file], env=os.environ | variables, text=True, start_new_session=True, **pipes)


def test_a_stopped_job_saves_and_is_queued_again(tmp_path: Path) -> None:
    write_commands(tmp_path / "bin")
    [port] = free_ports(1)
    launch = {"python": sys.executable, "environment": write_programs(tmp_path / "programs"), "ready_s": 60.0}
    model, urls = str(model_folder(tmp_path / "judge")), [f"http://127.0.0.1:{port}"]
    server = {"engine": "vllm", "model": model, "urls": urls, "launch": launch}
    run_file = run_of(tmp_path, "torch", servers={"judge": server}, evaluation={"at_ends": False})
    folder = tmp_path / "run"

    job = submitted(tmp_path, job_file(tmp_path, run_file, "run.steps=100000", "checkpoint.every=100000"), 1)
    try:
        wait_until(lambda: len(read_lines(folder / "metrics.jsonl")) > 0, job, pause=0.05)
        job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: says
        out, error = job.communicate(timeout=DEADLINE)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 130, (out, error)
    [step] = saved_steps(folder)
    assert f"stopped and saved after step {step} of 100000" in error
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid() * 10 + 1}\n"
    [log] = (tmp_path / "servers").glob("*/serve-0.log")
    assert "ready: judge at" in log.read_text() and log.read_text().endswith(": stopped\n")


def test_a_job_whose_servers_end_says_so(tmp_path: Path) -> None:
    write_commands(tmp_path / "bin")
    [port] = free_ports(1)
    environment = {**write_programs(tmp_path / "programs"), "FAULT": "dies"}
    launch = {"python": sys.executable, "environment": environment}
    model, urls = str(model_folder(tmp_path / "judge")), [f"http://127.0.0.1:{port}"]
    server = {"engine": "vllm", "model": model, "urls": urls, "launch": launch}
    run_file = run_of(tmp_path, "torch", servers={"judge": server})
    job = submitted(tmp_path, job_file(tmp_path, run_file), 3)
    _, error = job.communicate(timeout=DEADLINE)
    assert job.returncode == 1
    assert "error: the judges' servers have ended" in error and "CUDA error: no kernel image" in error
