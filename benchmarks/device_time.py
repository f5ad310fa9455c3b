"""What a process's first GPU does during updates: kernels by kind, launches, and gaps in which it waits for its host.

A gap is time between the first and the last kernel in which no kernel runs, copies counted as kernels.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# The first whose pattern a kernel's name has.
KINDS = (
    ("attention", r"sdpa|attention|flash|fmha|flex|cudnn"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|dot"),
    ("between devices", r"nccl|all_?gather|all_?reduce|reduce_?scatter"),
    ("copies", r"memcpy|memset|direct_copy|^copy"),
    ("sums and element-wise", r""),
)
SHOWN = 12  # places of gaps, the longest together first


class Span(NamedTuple):
    """A kernel's name, and when it began and ended, in milliseconds."""

    name: str
    begin: float
    end: float


def on_torch(run: Callable[[], None]) -> list[Span]:
    """What the GPU does while `run` runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [Span(event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3) for event in kernels]


def on_jax(run: Callable[[], None]) -> list[Span]:
    """What the GPU does while `run` runs and fetches its result."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [trace] = Path(folder).rglob("*.xplane.pb")
        planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(trace)).planes}
        first = min(name for name in planes if name.startswith("/device:GPU:"))
        return [
            Span(event.name, event.start_ns / 1e6, event.end_ns / 1e6)
            for line in planes[first].lines
            if line.name is not None and line.name.startswith("Stream")
            for event in line.events
        ]


def show(spans: list[Span], updates: int) -> None:
    """Print a few lines, of one update on average."""
    spans = sorted(spans, key=lambda span: span.begin)
    kinds: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        kinds[_kind(span.name)] += span.end - span.begin
    gaps = list(_gaps(spans))
    whole, idle = spans[-1].end - spans[0].begin, sum(gap for gap, _, _ in gaps)
    print(f"  an update {whole / updates:.1f} ms: {len(spans) / updates:.0f} launches, ", end="")
    print(", ".join(f"{kind} {kinds[kind] / updates:.1f}" for kind, _ in KINDS if kinds[kind]), end=", ")
    print(f"idle {idle / updates:.1f}")
    between: defaultdict[str, list[float]] = defaultdict(list)
    for gap, before, after in gaps:
        between[f"{before[:60]} and {after[:60]}"].append(gap)
    for names, found in sorted(between.items(), key=lambda entry: -sum(entry[1]))[:SHOWN]:
        each = f"{len(found) / updates:.1f} of {max(found):.2f} at most"
        print(f"    {sum(found) / updates:6.2f} ms idle, {each}, between {names}")


def _kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def _gaps(spans: list[Span]) -> Iterator[tuple[float, str, str]]:
    """Milliseconds in which nothing runs, and what ran before and after; spans in the order in which they began."""
    last = spans[0]
    for span in spans[1:]:
        if span.begin > last.end:
            yield span.begin - last.end, last.name, span.name
        if span.end > last.end:
            last = span
