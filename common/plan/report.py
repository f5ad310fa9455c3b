"""What a plan found, as tables: memory by kind, programs, collectives by mesh axis."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.plan.target import Target

# What a run does, each planned for by programs of its own.
PARTS = ("update", "logprobs", "sampling")
# Of a chip's memory; the rest is left to the runtime and to fragmentation.
SHARE = 0.9
_GIB = 2**30


class ProgramPlan(NamedTuple):
    """One program, for one chip.

    argument_bytes and temporary_bytes: memory while it runs, besides what `resident_bytes` are held and not given to
    it. flops: of all that it computes, loops counted. collective_bytes, least_bytes: by mesh axis, what the chip sends,
    and what it must. predicted_s: the compiler's own estimate of cycles, a prediction; 0 where it has none. floor_s:
    its flops at the chip's peak. compile_s: seconds that its compiler took here; 0 where it was counted.
    """

    name: str
    argument_bytes: int
    temporary_bytes: int
    resident_bytes: int
    flops: float
    collective_bytes: dict[str, int]
    least_bytes: dict[str, int]
    predicted_s: float
    floor_s: float
    compile_s: float

    @property
    def needed_bytes(self) -> int:
        """Memory of one chip while it runs."""
        return self.argument_bytes + self.temporary_bytes + self.resident_bytes

    @property
    def part(self) -> str:
        """Which of PARTS it belongs to."""
        return self.name.partition(":")[0]


class Plan(NamedTuple):
    """A config on a target. kinds: bytes of a chip by what lies there all the time. notes: sentences."""

    target: Target
    kinds: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def too_large(self) -> set[str]:
        """The parts that do not leave a tenth of the memory free."""
        allowed = SHARE * self.target.chip.memory_gib * _GIB
        return {program.part for program in self.programs if program.needed_bytes > allowed}

    @property
    def fits(self) -> bool:
        """Whether every program leaves a tenth of the memory free."""
        return not self.too_large


def report(plan: Plan) -> Group:
    """Everything a plan found, to be printed."""
    sent = [_collectives(plan.programs)] if any(program.collective_bytes for program in plan.programs) else []
    return Group(_kinds(plan), _programs(plan), *sent, *map(Text, (verdict(plan), *plan.notes)))


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    worst = max(plan.programs, key=lambda program: program.needed_bytes)
    memory = plan.target.chip.memory_gib
    return (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {worst.name} takes {worst.needed_bytes / _GIB:.2f} GiB of "
        f"{memory:g} GiB, {worst.needed_bytes / _GIB / memory:.0%}; {SHARE:.0%} may be used."
    )


def progress(words: str) -> None:
    """Say what is being looked at, beside the tables: on the standard error."""
    print(words, file=sys.stderr, flush=True)


def _kinds(plan: Plan) -> Table:
    rows = [(kind, _gib(size)) for kind, size in plan.kinds.items() if size]
    number = plan.target.num_chips
    title = f"{number} chip{'s' if number > 1 else ''} of {plan.target.name}"
    return _table(title, ("kind", "GiB a chip"), rows)


def _programs(plan: Plan) -> Table:
    rows = [
        (
            program.name,
            *map(_gib, (program.argument_bytes, program.temporary_bytes, program.resident_bytes)),
            f"{program.flops / 1e12:.4g}" if program.flops else "",
            f"{program.floor_s:.3g}" if program.floor_s else "",
            f"{program.predicted_s:.3g}" if program.predicted_s else "",
            f"{program.compile_s:.0f}" if program.compile_s else "",
        )
        for program in plan.programs
    ]
    heads = (
        "program",
        "arguments",
        "temporaries",
        "held besides",
        "TFLOP",
        "s at peak",
        "predicted s",
        "compiled in s",
    )
    return _table("programs, GiB and TFLOP a chip", heads, rows)


def _collectives(programs: Sequence[ProgramPlan]) -> Table:
    rows = []
    for program in programs:
        for axis, size in program.collective_bytes.items():
            least = program.least_bytes.get(axis, 0)
            rows.append((program.name, axis, _gib(size), _gib(least), f"{size / least:.2f}" if least else ""))
    return _table("collectives", ("program", "axis", "GiB sent a chip", "least", "ratio"), rows)


def _gib(size: int) -> str:
    return f"{size / _GIB:.3f}" if size else ""


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under their heads, without columns that hold nothing, but always the first."""
    kept = [index for index in range(len(heads)) if index == 0 or any(row[index] for row in rows)]
    table = Table(*(heads[index] for index in kept), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table
