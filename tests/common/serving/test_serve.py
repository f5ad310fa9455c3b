"""`safework serve` with real signals and real child processes, which stand in for the engines alone."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import psutil
import pytest
from aiohttp import web

from tests.common.serving.stand_in import stand_in
from tests.common.serving.stand_in_engine import write_programs
from tests.runs import finish, running, safework, wait_until
from tests.training import write_run


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, each another."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def model_folder(folder: Path, architecture: str = "LlamaForCausalLM") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return folder


class Config:
    """A run file with servers of a test, and `safework serve` on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.servers = folder, dict[str, dict[str, Any]]()
        self._found = write_programs(folder / "programs")
        self._model = str(model_folder(folder / "model"))

    def add(
        self, name: str, *ports: int, engine: str = "vllm", host: str = "127.0.0.1", ready_s: float = 60.0, **fault: str
    ) -> None:
        """A server that is launched; `fault` are variables of its environment."""
        launch = {"python": sys.executable, "ready_s": ready_s, "environment": {**self._found, **fault}}
        urls = [f"http://{host}:{port}" for port in ports]
        self.servers[name] = {"engine": engine, "model": self._model, "urls": urls, "launch": launch}

    @property
    def words(self) -> list[str]:
        """The words of the command."""
        file = write_run(self.folder, Path("unused"), servers=self.servers)
        return ["serve", str(file), "--logs", str(self.folder / "logs")]

    def log(self, name: str, port: int) -> str:
        return (self.folder / "logs" / f"{name}-{port}.log").read_text()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False


def servers_of(process: Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ended(pid: int) -> bool:
    """Whether a process has ended; one that waits to be collected has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended."""
    return all(ended(each.pid) for each in processes)


@contextmanager
def serving(words: list[str], *ports: int) -> Iterator[tuple[Popen[str], list[psutil.Process]]]:
    """The command with all ports answering, and what it started; nothing of that outlives the block."""
    with running("common.cli", *words) as process:
        wait_until(lambda: all(map(answers, ports)), process, pause=0.05)
        assert process.stdout is not None
        while "ready: " not in (line := process.stdout.readline()):
            assert line, "it ended"
        started = servers_of(process)
        try:
            yield process, started
        finally:
            for each in started:
                if each.is_running():
                    each.kill()


def error_of(run: CompletedProcess[str]) -> str:
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    return run.stderr


# Starting and stopping ------------------------------------------------------------------------------------------------


@pytest.fixture
def hangs_up() -> Iterator[None]:
    """SIGHUP as a terminal leaves it: under nohup these tests, and what they start, would ignore it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("hangs_up")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_servers_run_until_a_signal_and_leave_nobody_behind(config: Config, number: signal.Signals) -> None:
    a, b, c = free_ports(3)
    config.add("general", a, b)
    config.add("safety", c, engine="sglang", host="localhost")
    with serving(config.words, a, b, c) as (process, started):
        assert len(started) == 3
        process.send_signal(number)
        run = finish(process)
        assert gone(started)
    assert run.returncode == 0, run
    assert run.stderr == ""
    assert run.stdout.count(": stopped\n") == 3
    assert not any(map(answers, (a, b, c)))
    assert "listening" in config.log("general", b)


def test_progress_and_what_is_left_out_is_said(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("slow", port, FAULT="never", ready_s=12.0)
    config.servers["beside"] = {"engine": "in_process", "model": "embedded:smollm2"}
    config.servers["theirs"] = {"engine": "vllm", "model": "m", "urls": ["http://10.0.0.9:8000"]}
    run = safework(*config.words)
    lines = run.stdout.splitlines()
    assert lines[0] == "beside: runs in process, opened by the trainer"
    assert lines[1] == "theirs: has no launch table, left to whoever starts http://10.0.0.9:8000"
    log = config.folder / "logs" / f"slow-{port}.log"
    assert lines[2] == f"slow at http://127.0.0.1:{port}: starting, log in {log}"
    title, _, rest = lines[3].partition(" s, ")
    assert title.startswith(f"slow at http://127.0.0.1:{port}: 1") and rest == "listening"
    text = error_of(run)
    assert (
        "was not ready within 12 s (servers.slow.launch.ready_s); at last: /health said HTTP 503.\nThe end of" in text
    )
    assert "\n  | listening\n" in text


def test_what_a_server_starts_ends_with_it(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port, CHILD=str(config.folder / "child"))
    with serving(config.words, port) as (process, started):
        child = psutil.Process(int((config.folder / "child").read_text()))
        assert child in started
        process.terminate()
        run = finish(process)
        assert gone(started)
    assert run.returncode == 0


def test_a_second_signal_stops_at_once(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port, FAULT="deaf")
    with serving(config.words, port) as (process, started):
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        while "stopping" not in process.stdout.readline():
            assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        run = finish(process)
        assert time.monotonic() - begun < 5
        assert gone(started)
    assert run.returncode == 0
    assert "did not stop by itself and was killed" in run.stdout


def test_a_signal_while_starting_stops_what_was_begun(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port, FAULT="never")
    with running("common.cli", *config.words) as process:
        wait_until(lambda: len(servers_of(process)) == 1, process, pause=0.05)
        started = servers_of(process)
        process.send_signal(signal.SIGINT)
        run = finish(process)
    assert run.returncode == 130 and gone(started)
    assert "Traceback" not in run.stderr


def test_nobody_reading_ends_nothing(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port)
    with serving(config.words, port) as (process, started):
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert gone(started)


def test_one_server_alone(config: Config) -> None:
    a, b = free_ports(2)
    config.add("general", a)
    config.add("safety", b)
    # An override behind the option, where argparse does not look for it by itself.
    with serving([*config.words, "--only", "safety", "servers.safety.served_name=other"], b) as (_, started):
        assert len(started) == 1 and not answers(a)
        assert "loading\x1b[0m other" in config.log("safety", b)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_while_starting_is_shown_and_stops_the_others(config: Config) -> None:
    a, b = free_ports(2)
    config.add("general", a)
    config.add("broken", b, FAULT="dies")
    run = safework(*config.words)
    text = error_of(run)
    assert text.startswith(f"error: server broken at http://127.0.0.1:{b} ended while starting, after ")
    assert ", with exit code 1.\nThe end of " in text
    shown = [line for line in text.splitlines() if line.startswith("  | ")]
    assert len(shown) == 20
    assert shown[-1] == "  | CUDA error: no kernel image is available"
    assert "\x1b" not in text + run.stdout
    assert f"general at http://127.0.0.1:{a}: stopped" in run.stdout
    assert not answers(a)


def test_the_error_is_shown_when_much_was_written_behind_it(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port, FAULT="rambles")
    shown = [line for line in error_of(safework(*config.words)).splitlines() if line.startswith("  | ")]
    places = [index for index, line in enumerate(shown) if line == "  | ValueError: no such model"]
    assert shown[places[0] + 1] == "  | …"
    assert shown[-1] == "  | leaked 39" and len(shown) < 20


def test_a_server_that_dies_later_is_shown_and_stops_the_others(config: Config) -> None:
    a, b = free_ports(2)
    config.add("general", a)
    config.add("weak", b, FAULT="dies_later", CHILD=str(config.folder / "child"))
    run = safework(*config.words)
    text = error_of(run)
    assert f"server weak at http://127.0.0.1:{b} ended " in text and "with exit code 3.\nThe end of" in text
    assert text.endswith("  | engine core died\n")
    assert not answers(a)
    assert ended(int((config.folder / "child").read_text()))


def test_a_healthy_server_is_left_alone(config: Config) -> None:
    a, b = free_ports(2)
    config.add("general", a)
    with serving(config.words, a) as (_, started):
        again = safework(*config.words)
        assert again.returncode == 0
        model = config.servers["general"]["model"]
        assert f"general at http://127.0.0.1:{a}: serves {model} already, and is left alone\n" in again.stdout
        assert again.stdout.endswith("Nothing was started here.\n")
        config.add("safety", b)
        with serving(config.words, a, b) as (both, other):
            assert len(other) == 1
            both.terminate()
            finish(both)
        assert answers(a) and not gone(started)


async def another_model(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "another", "root": "another"}]})


async def no_server(_: web.Request) -> web.Response:
    return web.Response(status=404)


@pytest.mark.parametrize(
    ("handler", "said"),
    [(another_model, "serves 'another', and servers.general names"), (no_server, "/health said HTTP 404")],
)
def test_a_taken_port_is_an_error(config: Config, handler: Any, said: str) -> None:
    (b,) = free_ports(1)
    with stand_in(handler) as url:
        port = int(url.rpartition(":")[2])
        config.add("general", port)
        config.add("safety", b)
        run = safework(*config.words)
    text = error_of(run)
    assert f"port {port} is taken by something else" in text and said in text
    assert text.endswith("Stop that, or choose another port in servers.general.urls.\n")
    assert "starting" not in run.stdout


def test_another_machines_server_is_waited_for(config: Config) -> None:
    # 192.0.2.0/24 belongs to nobody.
    config.add("far", 8000, host="192.0.2.1", ready_s=1.0)
    config.servers["far"]["launch"]["python"] = "/not/on/this/machine/python"
    run = safework(*config.words)
    assert run.stdout.startswith("far at http://192.0.2.1:8000: not on this machine, only waited for\n")
    assert "server far at http://192.0.2.1:8000 was not ready within 1 s (servers.far.launch.ready_s)" in error_of(run)


def test_a_python_that_cannot_run_is_an_error(config: Config) -> None:
    (port,) = free_ports(1)
    config.add("general", port)
    bad = config.folder / "python"
    bad.write_text("no program")
    bad.chmod(0o755)
    run = safework(*config.words, f"servers.general.launch.python={bad}")
    assert "could not be started" in error_of(run) and "servers.general.launch.python" in run.stderr
