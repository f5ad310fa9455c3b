"""Records what a real server answers to each kind of question, as fixtures for tests without servers.

    python tests/engines/record.py vllm http://127.0.0.1:8211 --name judge --model FOLDER --out FILE [--head]

The questions are those of `questions.py`; FOLDER holds the served model's tokenizer. With --head the server is one of a
classifier. The file holds engine, version, date and command, and each call with its payload and reply.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.serving.dialect import Dialect
from common.serving.http import Call
from common.serving.rendering import Renderer
from common.serving.served import DIALECTS
from tests.engines.questions import LABELS, MAX_TOKENS, QUESTIONS


def ask(url: str, path: str, payload: dict[str, Any] | None) -> Any:
    """GET without a payload, else POST it; the reply's JSON."""
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def calls(dialect: Dialect, name: str, render: Renderer, head: bool, api: Any) -> Iterator[tuple[str, int, Call]]:
    """Each kind of call for each question, with the question's number."""
    label_ids = render.chat.first_tokens(LABELS)
    for number, question in enumerate(QUESTIONS):
        rendered = render(question)
        if head:
            yield "head", number, dialect.head(name, rendered, api)
        else:
            yield "generate", number, dialect.generate(name, rendered, MAX_TOKENS)
            yield "label_logprobs", number, dialect.label_logprobs(name, rendered, label_ids, api)


def main() -> None:
    """Ask and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=DIALECTS)
    parser.add_argument("url")
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--version", required=True, help="of the server")
    parser.add_argument("--dtype", required=True, help="what the server computes in")
    parser.add_argument("--command", required=True, help="how the server was started, for the record")
    words = parser.parse_args()
    dialect = DIALECTS[words.engine]
    api = ask(words.url, dialect.API, None)
    recorded = [
        {"kind": kind, "question": number, "path": call.path, "payload": call.payload, "reply": reply}
        for kind, number, call in calls(dialect, words.name, Renderer(words.model), words.head, api)
        if (reply := ask(words.url, call.path, call.payload))
    ]
    record = {
        "engine": words.engine,
        "version": words.version,
        "dtype": words.dtype,
        "date": datetime.date.today().isoformat(),
        "server": words.command,
        "command": shlex.join(["python", "tests/engines/record.py", *sys.argv[1:]]),
        "name": words.name,
        "models": {"path": dialect.MODELS, "reply": ask(words.url, dialect.MODELS, None)},
        "calls": recorded,
    }
    written = json.dumps(record, indent=1, ensure_ascii=False).replace(str(words.model), "smollm2")
    written = written.replace(f"{words.out.parent}/", "")
    words.out.write_text(written + "\n", encoding="utf-8")
    print(f"{words.out}: {len(recorded)} replies of {words.engine} {record['version']}")


if __name__ == "__main__":
    main()
