"""GRPO updates of TRL and tunix on the cases of `train_step.py`, in the same run and form, so that all can be compared.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/peers.py 0.5b [--peers trl tunix] [--recompute full none] [--updates 5] [--rows 16]

A peer trains by its own loop; only what it would have sampled is given: random tokens, advantages and old logprobs.
`full` is its gradient checkpointing.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

import train_step


def main() -> None:
    """Measure every case of every peer, each in a process of its own, or one when called for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=train_step.CASES)
    parser.add_argument("--peers", nargs="+", default=["trl", "tunix"], choices=["trl", "tunix"])
    parser.add_argument("--recompute", nargs="+", default=["full"], choices=["none", "full"])
    parser.add_argument("--rows", type=int, help="of a micro-batch, in place of the case's own")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.here:
        measure(arguments)
        return
    print(train_step.HEAD, flush=True)
    for case in arguments.cases:
        for recompute in arguments.recompute:
            for peer in arguments.peers:
                words = [case, "--peers", peer, "--recompute", recompute, "--updates", str(arguments.updates), "--here"]
                words += ["--rows", str(arguments.rows)] if arguments.rows else []
                subprocess.run([sys.executable, __file__, *words], check=False)


def measure(arguments: argparse.Namespace) -> None:
    """One case of one peer in this process."""
    [name], [peer], [recompute] = arguments.cases, arguments.peers, arguments.recompute
    case = train_step.CASES[name]
    case = case._replace(rows_per_microbatch=arguments.rows or case.rows_per_microbatch)
    ends, memory = importlib.import_module(f"peer_{peer}").trained(case, recompute == "full", arguments.updates)
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)
    train_step.show(name, case, peer, recompute, seconds, memory, ends[0])


if __name__ == "__main__":
    main()
