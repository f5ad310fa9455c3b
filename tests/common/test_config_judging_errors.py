"""Mistakes in the sections of judges, gates and servers: named, and never with somebody's password in the sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.config.servers import ServerSection
from tests.common.test_config_errors import message

JUDGE = "{server: %s, prompts: {en: {user: '{response}'}}, read_out: {type: scalar}}"
JUDGED = """\
servers: {s: {engine: vllm, model: m, urls: ['http://u']}}
rewards: {judges: {j: %s}, verifiers: {x: %s}}
"""


@pytest.mark.parametrize(
    ("server", "verifier", "start", "end"),
    [
        ("s", "{judge: j, rule: answer}", "rewards.verifiers.x = {'rule': 'answer'", "Set exactly one of the three."),
        (
            "s",
            "{judge: k}",
            "rewards.verifiers.x.judge = 'k'",
            "Known: j. Include its file of configs/judge, add it und",
        ),
        (
            "s",
            "{judge: j, options: {a: 1}}",
            "rewards.verifiers.x.options = {'a': 1}",
            "is described under rewards.judg",
        ),
        ("t", "{judge: j}", "rewards.judges.j.server = 't'", "Known: s. Add it under servers or correct the name."),
    ],
)
def test_judges_and_servers_are_named(server: str, verifier: str, start: str, end: str, tmp_path: Path) -> None:
    text = message(tmp_path, JUDGED % (JUDGE % server, verifier))
    assert text.startswith(start) and end in text


@pytest.mark.parametrize(
    "url",
    ["http://me:s3cret@host:8001/v1", "http://me:s3@c/ret@host:8001", "http://host:8001/?key=s3cret", "s3cret@host"],
)
def test_secrets_in_addresses_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    text = message(tmp_path, f"servers: {{s: {{engine: vllm, model: m, urls: ['http://a', '{url}']}}}}")
    assert text.startswith("servers.s.urls.1 (") and "api_key_env names the variable" in text
    assert not {"s3cret", "s3", "cret"} & set(re.split(r"\W", text.partition("): ")[2]))


@pytest.mark.parametrize(
    "servers",
    [
        "s3cret",
        "[s3cret]",
        "{s: 's3cret'}",
        "{s: {engine: vllm, model: m, urls: ['http://a'], launch: 'p --api-key s3cret'}}",
        "{s: {engine: vllm, model: m, urls: ['http://a'], launch: [p, s3cret]}}",
        "{s: {engine: vllm, model: m, urls: [[s3cret]]}}",
    ],
)
def test_what_is_no_server_is_not_repeated(servers: str, tmp_path: Path) -> None:
    text = message(tmp_path, f"servers: {servers}")
    assert text.startswith("servers") and "s3cret" not in text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8001",
        "ftp://host",
        "http://",
        "http://:80",
        "http://host:99999",
        "http://host:0",
        "http://a..b:80",
        f"http://{'a' * 64}.b",
        "http://host:x",
        "http://a b",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    text = message(tmp_path, f"servers: {{s: {{engine: vllm, model: m, urls: ['{url}']}}}}")
    assert text.startswith(f"servers.s.urls.0 = '{url}' (") and "is not the address of a server. Write http://" in text


@pytest.mark.parametrize("url", ["http://host", "https://a_b.c/v1/", "http://[::1]:8001", "http://10.0.0.1:65535"])
def test_addresses_are_taken(url: str) -> None:
    assert ServerSection.model_validate({"engine": "vllm", "model": "m", "urls": [url]}).urls == [url]


@pytest.mark.parametrize(
    "launch",
    [
        "options: ['--api_key=s3cret']",
        "options: ['--api-key s3cret']",
        "options: [--hf-token, 's3cret']",
        "options: ['--proxy', 'http://me:s3cret@proxy']",
        "options: --api-key s3cret",
        "options: ['--dtype', 's3cret', 1]",
        "options: {a: ['s3cret']}",
        "environment: {HF_TOKEN: 's3,]}cret'}",
        "environment: {HTTPS_PROXY: 'http://me:s3cret@proxy'}",
        "environment: {HF_TOKEN: 3333333}",
        "environment: [HF_TOKEN, s3cret]",
    ],
)
def test_secrets_of_a_launch_are_refused_and_not_repeated(launch: str, tmp_path: Path) -> None:
    table = f"{{engine: vllm, model: m, urls: ['http://a'], launch: {{python: p, {launch}}}}}"
    text = message(tmp_path, f"servers: {{s: {table}}}")
    assert text.startswith("servers.s.launch") and not {"s3", "s3cret", "cret", "3333333"} & set(re.split(r"\W", text))
    assert "would be kept with every run" in text or "must be " in text
    # Nor where something else is wrong with the server.
    text = message(tmp_path, f"servers: {{s: {table.replace('vllm', 'in_process').replace('p, ', 'p, x: 1, ')}}}")
    assert not {"s3", "s3cret", "cret", "3333333"} & set(re.split(r"\W", text))


def test_a_judge_of_negative_weight_is_refused(tmp_path: Path) -> None:
    """An empty answer has a judge's lowest score, so that such a recipe would pay for silence."""
    judged = JUDGED.replace("verifiers:", "recipe: {l: {x: -1}}, verifiers:")
    # A scalar has no lowest score, and an empty answer is asked about.
    text = message(tmp_path, judged % (JUDGE % "elsewhere", "{judge: j}"))
    assert text.startswith("rewards.judges.j.server") and "rewards.recipe.l.x" not in text
    number = JUDGE.replace("scalar", "number, grades: [1, 5]") % "s"
    text = message(tmp_path, judged % (number, "{judge: j}"))
    assert text.startswith("rewards.recipe.l.x = -1.0 (") and "Turn the judge around (the scores of its verd" in text


@pytest.mark.parametrize("verifier", ["{judge: j}", "{rule: overlong, options: {max_length: 9, buffer: 3}}"])
def test_gates_that_may_be_negative_are_refused(verifier: str, tmp_path: Path) -> None:
    gated = JUDGED.replace("verifiers:", "gates: {general_rule: [x]}, verifiers:")
    text = message(tmp_path, gated % (JUDGE % "s", verifier))
    assert text.startswith("rewards.gates.general_rule = ['x'] ") and "Make it a term, or choose" in text


@pytest.mark.parametrize(
    ("gates", "terms", "problem"),
    [
        ("[good, good]", "{good: 1}", "would multiply by it twice"),
        ("[good]", "{good: 1, long: 1}", "the term 'long' may score below 0"),
    ],
)
def test_gates_that_would_pay_the_worse_answer_are_refused(
    gates: str, terms: str, problem: str, tmp_path: Path
) -> None:
    verifiers = "{good: {rule: format}, long: {rule: overlong, options: {max_length: 9, buffer: 3}}}"
    text = message(tmp_path, f"rewards: {{verifiers: {verifiers}, recipe: {{l: {terms}}}, gates: {{l: {gates}}}}}")
    assert "rewards.gates.l = [" in text and problem in text


@pytest.mark.parametrize(
    "launch",
    ['options: ["a\\0b"]', 'environment: {X: "a\\0b"}', "environment: {A=B: x}", 'environment: {X: "\\uD800"}'],
)
def test_words_that_no_process_can_be_given_are_refused(launch: str, tmp_path: Path) -> None:
    table = f"{{engine: vllm, model: m, urls: ['http://a'], launch: {{python: p, {launch}}}}}"
    text = message(tmp_path, f"servers: {{s: {table}}}")
    assert text.startswith("servers.s.launch") and "Correct it" in text
