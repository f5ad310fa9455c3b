"""Calls to replicas under faults: each ends in time, with its own reply or with a sentence that names the culprit."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from aiohttp import web

from common.config.servers import ServerSection
from common.serving.http import Call, CallFailed, Replicas, Unanswered
from tests.common.serving.stand_in import Handler, stand_in


@contextmanager
def replicas(*urls: str, concurrency: int = 8, deadline_s: float = 5.0, retries: int = 3) -> Iterator[Replicas]:
    section = ServerSection(
        engine="vllm", model="m", urls=list(urls), concurrency=concurrency, deadline_s=deadline_s, retries=retries
    )
    with closing(Replicas("judge", section, {})) as opened:
        yield opened


def value(reply: Any) -> int:
    return int(reply["value"])


async def twice(request: web.Request) -> web.Response:
    """What a healthy server says: twice the number that it is asked."""
    return web.json_response({"value": 2 * (await request.json())["number"]})


def calls(count: int, read: Callable[[Any], int] = value) -> list[Call]:
    return [Call("/x", {"number": number}, read) for number in range(count)]


def results_of(opened: Replicas, asked: list[Call]) -> list[Any]:
    return [reply.result for reply in opened.call_all(asked)]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def failing(times: int, fault: Handler) -> Handler:
    """The first `times` requests meet the fault, the others a healthy server."""
    seen = iter(range(10**9))

    async def handle(request: web.Request) -> web.StreamResponse:
        return await (fault if next(seen) < times else twice)(request)

    return handle


def status(code: int) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=code, text="out of order")

    return handle


async def garbage(_: web.Request) -> web.Response:
    return web.Response(body=b"\xff\xfe<html>")


async def other_json(_: web.Request) -> web.Response:
    return web.json_response({"error": "loading"})


async def deep(_: web.Request) -> web.Response:
    return web.Response(body=b"[" * 200_000)


async def null(_: web.Request) -> web.Response:
    return web.json_response({"value": None})


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"value": ')
    assert request.transport is not None
    request.transport.close()
    return response


async def hanging(_: web.Request) -> web.Response:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits that long")


FAULTS = {
    "HTTP 500": status(500),
    "HTTP 429": status(429),
    "HTTP 503": status(503),
    "no JSON": garbage,
    "no JSON but [[[": deep,
    "KeyError('value')": other_json,
    "NoneType": null,
    "payload": half,
}


def test_calls_are_made_shortly_before_their_turn() -> None:
    made: list[int] = []
    ahead: list[int] = []

    async def counting(request: web.Request) -> web.Response:
        number = (await request.json())["number"]
        ahead.append(len(made) - number)
        return web.json_response({"value": 2 * number})

    def making() -> Iterator[Call]:
        for call in calls(200):
            made.append(call.payload["number"])
            yield call

    with stand_in(counting) as url, replicas(url, concurrency=4) as opened:
        replies = opened.call_all(making())
    assert [reply.result for reply in replies] == [2 * number for number in range(200)]
    assert max(ahead) <= 3 * 4


def test_a_call_that_cannot_be_made_leaves_the_client_well() -> None:
    def making() -> Iterator[Call]:
        yield from calls(20)
        raise ValueError("no such image")

    with stand_in(twice) as url, replicas(url, concurrency=2) as opened:
        for _ in range(3):
            with pytest.raises(ValueError, match="no such image"):
                opened.call_all(making())
        assert results_of(opened, calls(20)) == [2 * number for number in range(20)]


def test_every_reply_belongs_to_its_question() -> None:
    async def uneven(request: web.Request) -> web.Response:
        await asyncio.sleep(0.02 * ((await request.json())["number"] % 3))
        return await twice(request)

    with stand_in(uneven) as url, replicas(url) as opened:
        assert results_of(opened, calls(100)) == [2 * number for number in range(100)]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_costs_no_reply(fault: Handler) -> None:
    with stand_in(failing(3, fault)) as url, replicas(url) as opened:
        assert results_of(opened, calls(10)) == [2 * number for number in range(10)]


@pytest.mark.parametrize(("said", "fault"), FAULTS.items(), ids=FAULTS)
def test_a_lasting_fault_is_named_with_its_replica(said: str, fault: Handler) -> None:
    with stand_in(fault) as url, replicas(url, retries=1) as opened:
        started = time.monotonic()
        results = results_of(opened, calls(3))
    assert time.monotonic() - started < 5
    for result in results:
        assert isinstance(result, CallFailed)
        assert url in str(result) and "server judge, 2 tries" in str(result) and said in str(result)


def test_a_refusal_is_not_tried_again() -> None:
    asked = Counter()

    async def refuse(_: web.Request) -> web.Response:
        asked["times"] += 1
        return web.Response(status=400, text="too long")

    with stand_in(refuse) as url, replicas(url) as opened:
        (result,) = results_of(opened, calls(1))
    assert isinstance(result, CallFailed) and "HTTP 400: too long" in str(result)
    assert asked["times"] == 1


def test_a_reply_without_what_was_asked_for_is_not_tried_again() -> None:
    def lacking(reply: Any) -> int:
        raise Unanswered(f"nothing in {reply}")

    asked = Counter()

    async def counted(request: web.Request) -> web.Response:
        asked["times"] += 1
        return await twice(request)

    with stand_in(counted) as url, replicas(url) as opened:
        (result,) = results_of(opened, calls(1, lacking))
    assert isinstance(result, CallFailed)
    assert str(result) == f"{url}/x: nothing in {{'value': 0}} (server judge)"
    assert asked["times"] == 1


@pytest.mark.parametrize("fault", [other_json, status(400)], ids=["unreadable", "refused"])
def test_a_server_that_replies_is_not_down(fault: Handler) -> None:
    """Whatever it says: for longer than one call may take, all calls but the last fail, and the last has its reply."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        number = (await request.json())["number"]
        return await (twice if number == 59 else fault)(request)

    with stand_in(handle) as url, replicas(url, concurrency=1, deadline_s=1.0, retries=0) as opened:
        *others, last = results_of(opened, calls(60))
    assert last == 118
    assert all(isinstance(result, CallFailed) and "no reply" not in str(result) for result in others)


def test_a_hanging_server_ends_at_the_deadline() -> None:
    with stand_in(hanging) as url, replicas(url, concurrency=4, deadline_s=1.0, retries=1) as opened:
        started = time.monotonic()
        results = results_of(opened, calls(40))
        assert time.monotonic() - started < 4
    assert all(isinstance(result, CallFailed) and "judge" in str(result) for result in results)


def test_a_retry_whose_turn_comes_too_late_is_not_sent() -> None:
    with stand_in(hanging) as url, replicas(url, concurrency=1, deadline_s=1.0, retries=3) as opened:
        started = time.monotonic()
        results = results_of(opened, calls(2))
        assert time.monotonic() - started < 4
    assert all(isinstance(result, CallFailed) for result in results)


def test_a_server_that_is_down_ends_at_the_deadline() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with replicas(url, deadline_s=1.0) as opened:
        started = time.monotonic()
        results = results_of(opened, calls(500))
        assert time.monotonic() - started < 8
    assert all(isinstance(result, CallFailed) and url in str(result) for result in results)


@pytest.mark.parametrize("fault", ["closed", "hanging", "failing"])
def test_two_healthy_replicas_carry_a_third(fault: str) -> None:
    down = f"http://127.0.0.1:{closed_port()}"
    with (
        stand_in(hanging if fault == "hanging" else status(500)) as ill,
        stand_in(twice) as a,
        stand_in(twice) as b,
        replicas(down if fault == "closed" else ill, a, b, concurrency=4, deadline_s=4.0) as opened,
    ):
        assert results_of(opened, calls(200)) == [2 * number for number in range(200)]


def test_no_replica_is_asked_beyond_its_limit_and_all_of_them_work() -> None:
    running: Counter[str] = Counter()
    highest: Counter[str] = Counter()
    total: Counter[str] = Counter()

    def counted(name: str) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            running[name] += 1
            total[name] += 1
            highest[name] = max(highest[name], running[name])
            await asyncio.sleep(0.01)
            running[name] -= 1
            return await twice(request)

        return handle

    with stand_in(counted("a")) as a, stand_in(counted("b")) as b, replicas(a, b, concurrency=5) as opened:
        results_of(opened, calls(200))
    assert highest == {"a": 5, "b": 5}
    assert min(total.values()) > 60


def test_a_server_that_comes_back_is_used_again() -> None:
    port = closed_port()
    with replicas(f"http://127.0.0.1:{port}", deadline_s=0.5, retries=0) as opened:
        assert all(isinstance(result, CallFailed) for result in results_of(opened, calls(10)))
        with stand_in(twice, port):
            assert results_of(opened, calls(10))[-1] == 18


def test_a_fault_of_ours_is_raised_and_not_waited_for() -> None:
    def broken(_: Any) -> int:
        raise ZeroDivisionError("ours")

    with stand_in(twice) as url, replicas(url, concurrency=2) as opened, pytest.raises(ZeroDivisionError):
        results_of(opened, calls(5, broken))


def test_each_replica_is_asked_at_start() -> None:
    down = f"http://127.0.0.1:{closed_port()}"
    with stand_in(other_json) as a, stand_in(other_json) as b:
        with replicas(a, b) as opened:
            assert opened.ask_each("/v1/models", 5) == {a: {"error": "loading"}, b: {"error": "loading"}}
        with replicas(a, down) as opened:
            found = opened.ask_each("/v1/models", 5)
            assert found[a] == {"error": "loading"}
            assert isinstance(found[down], CallFailed) and f"{down}/v1/models" in str(found[down])
