"""What stands in for an engine's program in tests of faults: the real command line, health and model routes, no model.

The variables below go into `launch.environment`, so that a server of a test is a real child process of its own.

    FAULT=dies          ends with an error before it listens
    FAULT=rambles       so too, and writes much behind the error
    FAULT=never         listens and is never healthy
    FAULT=dies_later    ends one second after its first healthy reply
    FAULT=deaf          ignores SIGTERM
    CHILD=FILE          starts a process of its own, writes its id into FILE, and leaves it behind when it ends
"""

from __future__ import annotations

from pathlib import Path

PROGRAMS = {"vllm": "vllm/entrypoints/openai/api_server.py", "sglang": "sglang/launch_server.py"}

SOURCE = """\
import asyncio, os, signal, subprocess, sys
from aiohttp import web

words, fault = sys.argv[1:], os.environ.get("FAULT", "")
value = lambda flag: words[words.index(flag) + 1]
print("\\x1b[31mloading\\x1b[0m", value("--served-model-name"), flush=True)
if "CHILD" in os.environ:
    # A child that SIGTERM does not end, as an engine's own can be when it hangs.
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    open(os.environ["CHILD"], "w").write(str(child.pid))
if fault == "dies":
    for number in range(30):
        print("line", number, flush=True)
    sys.exit("CUDA error: no kernel image is available")
if fault == "rambles":
    print("ValueError: no such model", flush=True)
    for number in range(40):
        print("leaked", number, flush=True)
    sys.exit(1)
if fault == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

async def health(_):
    if fault == "dies_later":
        asyncio.get_running_loop().call_later(1.0, die)
    return web.Response(status=503 if fault == "never" else 200)

def die():
    print("engine core died", flush=True)
    os._exit(3)

async def models(_):
    name = value("--served-model-name")
    root = value("--model" if "--model" in words else "--model-path")
    return web.json_response({"data": [{"id": name, "root": root}], "model_path": root})

async def main():
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/get_model_info", models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, value("--host"), int(value("--port"))).start()
    print("listening", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def write_programs(folder: Path) -> dict[str, str]:
    """Programs under the engines' own module names; the environment in which this Python finds them."""
    for path in PROGRAMS.values():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SOURCE)
    return {"PYTHONPATH": str(folder)}
