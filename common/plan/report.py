"""What a plan found, as tables: memory by kind, programs, collectives by mesh axis; and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common.plan.target import Target

# What a run does, each planned for by programs of its own.
PARTS = ("update", "logprobs", "sampling")
# Of a chip's memory; the rest is left to the runtime and to fragmentation.
SHARE = 0.9
_GIB = 2**30
Job = TypeVar("Job")


class ProgramPlan(NamedTuple):
    """One program, for one chip.

    argument_bytes and temporary_bytes: memory while it runs, besides what `resident_bytes` are held and not given to
    it. flops: of all that it computes, loops counted. collective_bytes, least_bytes: by mesh axis, what the chip sends,
    and what it must. predicted_s: the compiler's own estimate of cycles, a prediction; 0 where it has none. floor_s:
    its flops at the chip's peak, or its least bytes, whichever takes longer, where that is known. compile_s: seconds
    that it took here to find this out.
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


class Plan(NamedTuple):
    """A config on a target. kinds: bytes of a chip by what lies there all the time. notes: sentences."""

    target: Target
    kinds: dict[str, int]
    programs: tuple[ProgramPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every program leaves a tenth of the memory free."""
        return max(program.needed_bytes for program in self.programs) <= SHARE * self.target.chip.memory_gib * _GIB


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


def with_remedy(
    job: Job, planned: Callable[[Job], Plan], changes: Callable[[Job], Iterator[tuple[str, Job]]], how: str
) -> Plan:
    """The plan of a job and, where that does not fit, the first of its changes that does; how: the way of looking at
    it, such as `counted`.
    """
    found = planned(job)
    if found.fits:
        return found
    return found._replace(notes=(_smallest_change(changes(job), planned, how), *found.notes))


def _smallest_change(changes: Iterator[tuple[str, Job]], planned: Callable[[Job], Plan], how: str) -> str:
    tried = []
    for words, changed in changes:
        tried.append(words)
        if planned(changed).fits:
            return f"It fits with {words}: {how} and checked."
    return f"None of these makes it fit, {how} one by one: {'; '.join(tried) or 'there was nothing to try'}."


def _kinds(plan: Plan) -> Table:
    table = Table(
        "kind", "GiB a chip", title=f"{plan.target.num_chips} chips of {plan.target.name}", title_justify="left"
    )
    for kind, size in plan.kinds.items():
        table.add_row(kind, f"{size / _GIB:.3f}")
    return table


def _programs(plan: Plan) -> Table:
    heads = ("program", "arguments", "temporaries", "held besides", "TFLOP", "predicted s", "floor s", "found in s")
    table = Table(*heads, title="programs, GiB a chip; seconds are predictions", title_justify="left")
    for program in plan.programs:
        sizes = (program.argument_bytes, program.temporary_bytes, program.resident_bytes)
        table.add_row(
            program.name,
            *(f"{size / _GIB:.3f}" for size in sizes),
            f"{program.flops / 1e12:.2f}",
            f"{program.predicted_s:.3f}" if program.predicted_s else "",
            f"{program.floor_s:.3f}",
            f"{program.compile_s:.0f}",
        )
    return table


def _collectives(programs: Sequence[ProgramPlan]) -> Table:
    heads = ("program", "axis", "GiB sent a chip", "least", "ratio")
    table = Table(*heads, title="collectives", title_justify="left")
    for program in programs:
        for axis, size in program.collective_bytes.items():
            least = program.least_bytes.get(axis)
            known = ("", "") if not least else (f"{least / _GIB:.3f}", f"{size / least:.2f}")
            table.add_row(program.name, axis, f"{size / _GIB:.3f}", *known)
    return table
