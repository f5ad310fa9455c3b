"""The program that compares mathematical expressions, run as a process of its own because sympy may never return.

One JSON line in, one out: `{"reference": ..., "answer": ...}` gives `{"equal": ...}`. The first line out is `{}`:
ready. The process ends with its standard input; while it computes and cannot read, its processor-time limit ends it,
so it does not outlive a killed trainer. `math_process` starts it and holds the wall clock.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys

MEMORY_LIMIT = 4 * 2**30


def _limit_processor_time(seconds: float) -> None:
    """End the process after this much more processor time; holds in the middle of C code, where a thread would not."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main(limit_s: float) -> None:
    """Answer until standard input ends."""
    # The protocol keeps the real standard output to itself: whatever a library prints goes to standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("{}", file=out)
    for line in sys.stdin:
        _limit_processor_time(limit_s)
        task = json.loads(line)
        # Timeouts of math-verify are off: they need SIGALRM, cannot interrupt C code, and the parent keeps the clock.
        reference, answer = (
            parse(f"${task[side]}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
            for side in ("reference", "answer")
        )
        print(json.dumps({"equal": bool(verify(reference, answer, timeout_seconds=None))}), file=out)


if __name__ == "__main__":
    main(float(sys.argv[1]))
