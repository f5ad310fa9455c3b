"""The command lines of servers, and what of a config cannot be started, in one sentence each."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.config import ConfigError, load_config
from common.config.explain import explain, forbidden_changes
from common.config.launching import LaunchSection
from common.config.servers import ServerSection
from common.serving import sglang, vllm
from common.serving.launch import Address, Loaded, command, served_name
from common.serving.served import ServerError, served_weights
from common.serving.sites import Plan, find_sites
from tests.training import write_run

URL = "http://127.0.0.1:8001"


# Command lines --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A server section, and the words of its command behind `-m`."""

    engine: str
    section: dict[str, Any]
    launch: dict[str, Any]
    has_head: bool
    words: str


VLLM = "vllm.entrypoints.openai.api_server --model /models/rm --served-model-name"
SGLANG = "sglang.launch_server --model-path /models/rm --served-model-name"
HERE = "--host 127.0.0.1 --port 8001"

CASES = [
    Case("vllm", {}, {}, False, f"{VLLM} /models/rm {HERE} --tensor-parallel-size 1"),
    Case("vllm", {"served_name": "rm"}, {}, False, f"{VLLM} rm {HERE} --tensor-parallel-size 1"),
    Case("vllm", {}, {}, True, f"{VLLM} /models/rm {HERE} --tensor-parallel-size 1 --runner pooling"),
    Case(
        "vllm",
        {},
        {"tensor_parallel": 8, "memory_fraction": 0.5, "options": ["--dtype", "float32"]},
        False,
        f"{VLLM} /models/rm {HERE} --tensor-parallel-size 8 --gpu-memory-utilization 0.5 --dtype float32",
    ),
    Case("sglang", {}, {}, False, f"{SGLANG} /models/rm {HERE} --tp-size 1"),
    Case("sglang", {}, {"tensor_parallel": 2}, True, f"{SGLANG} /models/rm {HERE} --tp-size 2 --is-embedding"),
    Case(
        "sglang",
        {},
        {"memory_fraction": 0.8, "options": ["--disable-cuda-graph"]},
        False,
        f"{SGLANG} /models/rm {HERE} --tp-size 1 --mem-fraction-static 0.8 --disable-cuda-graph",
    ),
]


def server(engine: str, **keys: Any) -> ServerSection:
    return ServerSection.model_validate({"engine": engine, "model": "/models/rm", "urls": [URL], **keys})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_command_line(case: Case) -> None:
    section = server(case.engine, **case.section)
    launch = LaunchSection(python="~/venv/bin/python", **case.launch)
    model = Loaded("/models/rm", case.has_head, served_name(section))
    words = command(section, launch, model, Address("127.0.0.1", 8001))
    assert words[:2] == [str(Path.home() / "venv/bin/python"), "-m"]
    assert words[2:] == case.words.split()


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        ("vllm", "--port"),
        ("vllm", "--port=1"),
        ("vllm", "--tensor_parallel_size"),
        ("vllm", "--gpu-memory-utilization"),
        ("vllm", "--runner"),
        ("sglang", "--model-path"),
        ("sglang", "--mem-fraction-static=0.3"),
    ],
)
def test_options_do_not_contradict_the_other_keys(engine: str, option: str) -> None:
    section = server(engine)
    model = Loaded("/models/rm", True, served_name(section))
    with pytest.raises(ConfigError, match=r"follows from the server's other keys\. Leave it out"):
        command(section, LaunchSection(python="p", options=[option, "x"]), model, Address("127.0.0.1", 8001))


@pytest.mark.parametrize(
    ("engine", "keys", "reply"),
    [
        ("vllm", {}, {"data": [{"id": "/models/rm", "root": "/models/rm"}]}),
        ("vllm", {"served_name": "rm"}, {"data": [{"id": "rm", "root": "/models/rm"}]}),
        ("vllm", {"model": "~/rm"}, {"data": [{"id": "~/rm", "root": str(Path.home() / "rm")}]}),
        ("vllm", {"model": "owner/rm"}, {"data": [{"id": "owner/rm", "root": "owner/rm"}]}),
        ("sglang", {}, {"model_path": "/models/rm"}),
        ("sglang", {"model": "~/rm"}, {"model_path": str(Path.home() / "rm")}),
        ("sglang", {"model": "owner/rm"}, {"model_path": "owner/rm"}),
    ],
)
def test_the_name_is_the_one_that_judges_look_for(engine: str, keys: dict[str, str], reply: Any) -> None:
    """Replies as the engines give them to what the command lines above say."""
    section = server(engine, **keys)
    name = served_name(section)
    assert served_weights("s", section, name, URL, reply).startswith(f"{name} from ")
    with pytest.raises(ServerError, match=r"serves 'other', and servers\.s names"):
        other = {"data": [{"id": "other", "root": "other"}], "model_path": "other"}
        served_weights("s", section, name, URL, other)
    assert {"vllm": vllm, "sglang": sglang}[engine].identity(reply)[0] == name


# Sites ----------------------------------------------------------------------------------------------------------------


def launched(folder: Path, **keys: Any) -> dict[str, Any]:
    """A server that can be launched; `keys` change it."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    table = {"engine": "vllm", "model": str(model), "urls": [URL], "launch": {"python": sys.executable}}
    return {key: value for key, value in {**table, **keys}.items() if value is not None}


def plan(folder: Path, only: str | None = None, **servers: dict[str, Any]) -> Plan:
    return find_sites(load_config([write_run(folder, Path("unused"), servers=servers)]), only)


def problem(folder: Path, only: str | None = None, **servers: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(folder, only, **servers)
    text = str(caught.value)
    assert text.endswith((".", ")"))
    return text


def test_a_head_is_seen(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text('{"architectures": ["Qwen2ForSequenceClassification"]}')
    found = plan(tmp_path, a=launched(tmp_path), b=launched(tmp_path, model=str(tmp_path / "head"), urls=[URL[:-1]]))
    a, b = [site.here.command for site in found.sites if site.here is not None]
    assert "--runner" not in a and b[-2:] == ["--runner", "pooling"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://127.0.0.1:8001/", "127.0.0.1"),
        ("http://localhost:8001", "localhost"),
        ("http://0.0.0.0:8001", "0.0.0.0"),
        (f"http://{socket.gethostname()}:8001", "0.0.0.0"),
        ("http://192.0.2.1:8001", None),
        ("https://192.0.2.1/judge", None),
        ("http://nowhere.invalid:8001", None),
    ],
)
def test_where_a_url_is(url: str, host: str | None, tmp_path: Path) -> None:
    (site,) = plan(tmp_path, s=launched(tmp_path, urls=[url])).sites
    assert (site.here and site.here.address) == (host and Address(host, 8001))
    assert site.url == url.rstrip("/")


@pytest.mark.parametrize(
    ("keys", "start", "end"),
    [
        ({"launch": {"python": "/no/python"}}, "servers.s.launch.python = '/no/python' (", "each make one."),
        ({"launch": {"python": "/etc/passwd"}}, "servers.s.launch.python = '/etc/passwd' (", "each make one."),
        ({"model": "no/such/folder"}, "servers.s.model = 'no/such/folder' (", "no such folder. Give a Hugging Face"),
        ({"model": "/tmp"}, "servers.s.model = '/tmp' (", "holds no config.json. Give a Hugging Face model folder."),
        ({"urls": ["http://127.0.0.1"]}, "servers.s.urls.0 = 'http://127.0.0.1' (", "Write http://HOST:PORT."),
        ({"urls": ["https://127.0.0.1:80"]}, "servers.s.urls.0 = 'https://127.0.0.1:80' (", "Write http://HOST:PORT."),
        ({"urls": [URL, "http://localhost:8001"]}, "servers.s.urls (", f"of s at {URL} too. Give each url its"),
        (
            {"launch": {"python": sys.executable, "options": ["--port", "1"]}},
            "servers.s.launch.options (",
            "--port follows from the server's other keys. Leave it out",
        ),
        ({"engine": "sglang", "served_name": "rm"}, "servers.s.served_name = 'rm' (", "Leave it out, or set it to /"),
    ],
)
def test_what_cannot_be_started(keys: dict[str, Any], start: str, end: str, tmp_path: Path) -> None:
    text = problem(tmp_path, s=launched(tmp_path, **keys))
    assert text.startswith(start) and end in text
    assert f"({tmp_path / 'run.yaml'}:" in text


def test_nothing_to_start(tmp_path: Path) -> None:
    assert "none is to be started here (there are none). Set servers.NAME.launch.python" in problem(tmp_path)
    beside = {"engine": "in_process", "model": "embedded:smollm2"}
    text = problem(tmp_path, a=beside, b=launched(tmp_path, launch=None))
    assert f"(a: runs in process, opened by the trainer; b: has no launch table, left to whoever starts {URL})" in text
    assert "(a: runs in process" in problem(tmp_path, "a", a=beside, b=launched(tmp_path))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    text = problem(tmp_path, "c", b=launched(tmp_path), a=launched(tmp_path))
    assert text == "--only c: no server of this name. Known: a, b. Give one of them."


# The section ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ({"launch": {"python": "p", "pythn": "p"}}, "servers.s.launch.pythn ({}): is not a key of the config. Did you"),
        ({"launch": {}}, "servers.s.launch.python ({}): is not set and has no default. Set it"),
        (
            {"launch": {"python": "p", "options": ["--config", "x.yaml"]}},
            "servers.s.launch = {{'python': 'p', 'options': '…'}} ({}): --config names a file, and records would not",
        ),
        (
            {"launch": {"python": "p", "options": [1]}},
            "servers.s.launch.options.0 ({}): must be text. Put it in quotes",
        ),
        ({"launch": {"python": "p", "memory_fraction": 2}}, "launch.memory_fraction = 2 ({}): must be at most 1.0."),
        ({"engine": "in_process", "urls": None}, "a model in process is opened by the trainer. Leave launch out."),
    ],
)
def test_a_launch_table_that_is_wrong(keys: dict[str, Any], end: str, tmp_path: Path) -> None:
    file = write_run(tmp_path, Path("unused"), servers={"s": launched(tmp_path, **keys)})
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert end.format(f"{file}:1") in str(caught.value)


def test_a_resumed_run_may_start_its_servers_otherwise(tmp_path: Path) -> None:
    def config(**keys: Any) -> Any:
        return load_config([write_run(tmp_path, Path("unused"), servers={"s": launched(tmp_path, **keys)})])

    launch: dict[str, Any] = {"python": "other", "options": ["--max-num-seqs", "9"], "ready_s": 5.0}
    launch["environment"] = {"CUDA_VISIBLE_DEVICES": "1"}
    before, after, without = config(), config(launch=launch), config(launch=None)
    assert forbidden_changes(before.config, after.config) == []
    assert forbidden_changes(without.config, after.config) == []
    launch["options"] += ["--dtype", "float32"]
    launch["environment"] = {"A": "1"}
    assert forbidden_changes(after.config, config(launch=launch).config) == [
        "servers.s.launch, what of it changes answers: was None, is ['A=1', '--dtype', 'float32']"
    ]
    (tmp_path / "again.yaml").write_text(explain(after))
    assert load_config([tmp_path / "again.yaml"]).config == after.config
