"""A run that a judge scores: a tiny policy, a tiny classifier, and the launch table of the classifier's server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.launch.classifier_engine import write_program
from tests.runs import lowercase_run
from tests.tiny import make_classifier


def judged_run(folder: Path, *urls: str, **sections: dict[str, Any]) -> Path:
    """A run file for two processes, whose rewards come from the server `taste`; `sections` change single keys."""
    launch = {"python": sys.executable, "environment": write_program(folder / "programs"), "ready_s": 120.0}
    taste = {
        "engine": "vllm",
        "model": str(make_classifier(folder / "classifier", num_hidden_layers=1, classes=2)),
        "urls": list(urls),
        "launch": launch,
    }
    judge = {
        "server": "taste",
        "read_out": {"type": "classes", "verdicts": {"dull": 0.0, "fine": 1.0}},
        "prompts": {"en": {"user": "Is this fine?\n{response}"}},
    }
    tables: dict[str, dict[str, Any]] = {
        "rollout": {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 4},
        "batch": {"row_tokens": 128, "rows_per_microbatch": 4},
        "servers": {"taste": taste},
        "rewards": {
            "cache": False,
            "verifiers": {"taste": {"judge": "taste"}},
            "judges": {"taste": judge},
            "recipe": {"instruction_rule": {"taste": 1.0}},
        },
    }
    for name, changes in sections.items():
        tables[name] = {**tables.get(name, {}), **changes}
    return lowercase_run(folder, **tables)
