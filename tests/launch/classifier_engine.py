"""A real server of a tiny classifier, where vLLM would be too large: a Hugging Face model, its forward pass, and the
routes of vLLM that a judge with a head uses. Started by a launch table like vLLM itself.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

MODULE = "vllm/entrypoints/openai/api_server.py"


def write_program(folder: Path) -> dict[str, str]:
    """This program under the module name of vLLM; the environment in which this Python finds it."""
    file = folder / MODULE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(Path(__file__).read_text())
    return {"PYTHONPATH": str(folder)}


def main() -> None:
    """Serve the model of --model until a signal."""
    import torch
    from aiohttp import web
    from transformers import LlamaForSequenceClassification

    def option(flag: str) -> str:
        return sys.argv[sys.argv.index(flag) + 1]

    torch.set_num_threads(1)
    folder, name = option("--model"), option("--served-model-name")
    model = LlamaForSequenceClassification.from_pretrained(folder, pad_token_id=None).eval()

    async def classify(request: web.Request) -> web.Response:
        question = await request.json()
        assert question["use_activation"] is False
        with torch.inference_mode():
            outputs = model(input_ids=torch.tensor([question["input"]])).logits[0]
        return web.json_response({"data": [{"probs": outputs.tolist()}]})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "root": folder}]})

    async def routes(_: web.Request) -> web.Response:
        return web.json_response({"paths": {"/classify": {}, "/pooling": {}}})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.post("/classify", classify), web.get("/v1/models", models)])
        app.add_routes([web.get("/openapi.json", routes), web.get("/health", health)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, option("--host"), int(option("--port"))).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
