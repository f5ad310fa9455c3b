"""A stand-in for a model server, for faults and load only: real HTTP on a real port, replies as a test wants them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def stand_in(handler: Handler, port: int = 0) -> Iterator[str]:
    """The address of a server that answers every request by `handler`, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def route(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", route)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        return runner, site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    runner, chosen = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{chosen}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Vllm:
    """Speaks vLLM's dialect: says `name` from `root`, answers with `text`, and keeps what it was asked. newest: lists
    the tokens it is asked for. writes: has routes that generate. classifies: has the route of heads beside that of
    outputs at every token. key: what it wants to be asked with.
    """

    def __init__(
        self,
        name: str = "judge",
        root: str = "/models/judge",
        text: str = "good",
        newest: bool = True,
        writes: bool = True,
        classifies: bool = True,
        key: str | None = None,
    ) -> None:
        self.name, self.root, self.text, self.newest, self.writes, self.key = name, root, text, newest, writes, key
        self.routes = {"/pooling": {}} | ({"/classify": {}} if classifies else {})
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": self.name, "root": self.root}]})
        if request.path == "/openapi.json":
            properties = {"logprob_token_ids": {}} if self.newest else {}
            schemas = {"CompletionRequest": {"properties": properties}} if self.writes else {}
            return web.json_response({"components": {"schemas": schemas}, "paths": self.routes})
        if not self.writes and request.path not in self.routes:
            return web.Response(status=404)
        payload = await request.json()
        self.asked.append((request.path, payload))
        labels = (payload.get("sampling_params") or payload).get("logprob_token_ids", ())
        found = {f"token_id:{token}": -float(token) for token in labels}
        listed = [{"token": token, "logprob": logprob} for token, logprob in found.items()]
        logprobs = {"top_logprobs": [found], "content": [{"top_logprobs": listed}]}
        choice = {"text": self.text, "message": {"content": self.text}, "logprobs": logprobs}
        heads = {"probs": [0.5, -2.0], "data": [[0.0, 0.0], [0.25, -1.0]]}
        return web.json_response({"choices": [choice], "data": [heads]})
