"""The math worker as a process: limits, deaths, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.rewards.rules import math_process
from common.rewards.rules.math_process import MathProcess
from common.types import Missing

ENDLESS = "9^{9^{9^{9}}}"
ROOT = Path(math_process.__file__).parents[3]


@pytest.fixture
def worker() -> Iterator[MathProcess]:
    process = MathProcess(limit_s=1.0)
    yield process
    process.close()


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def test_compares_and_stays(worker: MathProcess) -> None:
    assert worker.pid is None
    assert worker.equal("1/2", r"\frac{2}{4}") is True
    pid = worker.pid
    assert worker.equal("1/2", "2") is False
    assert worker.pid == pid is not None


SIGNALLED = r"""
import os, signal
from common.rewards.rules.math_process import MathProcess

signals = (signal.SIGINT, signal.SIGTERM)
for number in signals:
    signal.signal(number, lambda *_: None)
worker = MathProcess(limit_s=20.0)
assert worker.equal("1", "1") is True
pid = worker.pid
for number in signals:
    os.killpg(0, number)
assert worker.equal("1", r"\sqrt{1}") is True
assert worker.pid == pid is not None
worker.close()
"""


def test_signals_of_the_trainers_group_do_not_reach_it() -> None:
    subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, start_new_session=True, check=True, timeout=120)


def test_odd_input_is_not_equal(worker: MathProcess) -> None:
    for text in ("}{", r"\frac{", "\n\n", '"', "\u2028", "\\", "你好"):
        assert worker.equal("1", text) is False


def test_the_limit_kills_the_worker_and_the_next_comparison_works(worker: MathProcess) -> None:
    assert worker.equal("1", r"\sqrt{1}") is True
    stuck = worker.pid
    assert stuck is not None
    start = time.monotonic()
    result = worker.equal("7", ENDLESS)
    assert time.monotonic() - start < 2.5
    assert result == Missing(f'comparing the answer "{ENDLESS}" with the reference "7" took longer than 1 s')
    assert not psutil.pid_exists(stuck)
    assert worker.equal("1", r"\sqrt{1}") is True


def test_a_killed_worker_is_replaced(worker: MathProcess) -> None:
    assert worker.equal("1", r"\sqrt{1}") is True
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first, 5)
    assert worker.equal("1", r"\sqrt{1}") is True
    assert worker.pid not in (None, first)


def test_a_worker_that_dies_while_it_compares_is_missing(worker: MathProcess) -> None:
    slow = MathProcess(limit_s=20)
    assert slow.equal("1", r"\sqrt{1}") is True
    assert slow.pid is not None
    killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; kill -9 {slow.pid}"])
    result = slow.equal("7", ENDLESS)
    killer.wait()
    slow.close()
    assert result == Missing(f'comparing the answer "{ENDLESS}" with the reference "7" died (exit code -9) within 20 s')


def test_close_ends_the_worker_and_scoring_may_go_on(worker: MathProcess) -> None:
    worker.close()
    worker.equal("1", "1")
    pid = worker.pid
    assert pid is not None
    worker.close()
    assert not psutil.pid_exists(pid) and worker.pid is None
    assert worker.equal("1", r"\sqrt{1}") is True


def test_no_engine_and_no_tokenizer_in_the_worker(worker: MathProcess) -> None:
    worker.equal("1", r"\sqrt{1}")
    assert worker.pid is not None
    mapped = " ".join(region.path for region in psutil.Process(worker.pid).memory_maps())
    assert not [name for name in ("torch", "jax", "tokenizers") if f"/{name}" in mapped]


def test_file_descriptors_and_children_do_not_grow(worker: MathProcess) -> None:
    me = psutil.Process()
    worker.equal("1", "1")
    before = me.num_fds(), len(me.children())
    for _ in range(2):
        worker.close()
        worker.equal("1", r"\sqrt{1}")
    assert (me.num_fds(), len(me.children())) == before


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_the_worker_ends_with_its_parent(busy: bool) -> None:
    """Also in the middle of an endless computation, where it cannot notice that its input has ended."""
    program = (
        "from common.rewards.rules.math_process import MathProcess\n"
        "import threading, time\n"
        "worker = MathProcess(limit_s=1.0 if BUSY else 60.0)\n"
        "worker.equal('1', '2-1')\n"
        "print(worker.pid, flush=True)\n"
        "if BUSY:\n"
        f"    threading.Thread(target=worker.equal, args=('7', '{ENDLESS}')).start()\n"
        "time.sleep(0.3)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    ).replace("BUSY", str(busy))
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
    wait_until_gone(pid, 10)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_process.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"math worker ended with exit code 1"):
        MathProcess(limit_s=1.0).equal("1", r"\sqrt{1}")
