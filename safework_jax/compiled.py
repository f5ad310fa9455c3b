"""The TPU's compiler: chips that are not here to compile for, and what a compiled program's text says: collectives with
their bytes by mesh axis, and its own estimate of cycles, each times the trips of the loops around it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies

from common.config import ConfigError
from common.plan.target import Target

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|body|condition|branch_computations|to_apply)=(?:\{([^}]*)\}|(%[\w.-]+))")
# Between slices there are no collectives: the hosts do them, and a chip sends to its host what they need.
_HOSTS = {"ALL_REDUCE": "all-reduce", "ONE_TO_ONE": "collective-permute"}
# The compiler writes a reduce-scatter as an all-reduce and a slice, inside a computation of this name.
_SCATTER = "all-reduce-scatter"


def chips(target: Target) -> list[Any]:
    """A target's chips as JAX devices to compile for. Raises ConfigError where the compiler does not know it."""
    # The compiler asks a machine's metadata service for a TPU, and lets one process a machine in, unless told not to.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # It warns of not knowing its own host, which is none: the chips are those of `topology_name`.
    os.environ.update(TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
    slices = {} if target.slices == 1 else {"num_slices": target.slices}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target.name, **slices).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"--target {target.name}: the TPU's compiler does not know it or is missing ({said}). Install libtpu "
            "(pip install 'safework[tpu]'), or choose a shape that exists."
        ) from error


def wanted_bytes(name: str, error: Exception) -> int:
    """The bytes that the compiler says it would need, where it refuses a program for want of memory. Raises ConfigError
    where it refuses it for something else.
    """
    sizes = [float(size) for size in re.findall(r"([\d.]+)G", str(error))]
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise ConfigError(f"the TPU's compiler refuses {name!r}: {str(error).splitlines()[0]}") from error
    return int(max(sizes) * 2**30)


class Collective(NamedTuple):
    """One collective: what it does, over which mesh axes, in which dtypes, its result's bytes on a chip, its runs."""

    operation: str
    axes: tuple[str, ...]
    dtypes: frozenset[str]
    result_bytes: int
    members: int
    runs: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that a chip sends in all runs, by the ring algorithm."""
        share = (self.members - 1) / self.members
        per_run = {
            "all-gather": share * self.result_bytes,
            "reduce-scatter": (self.members - 1) * self.result_bytes,
            "all-reduce": 2 * share * self.result_bytes,
            "all-to-all": share * self.result_bytes,
            "collective-permute": self.result_bytes,
        }[self.operation]
        return round(self.runs * per_run)


class _Instruction(NamedTuple):
    """An instruction of a computation, as far as it tells how often a loop runs."""

    operation: str
    operands: list[str]
    line: str


class CompiledText:
    """The text of one program over a mesh of these axes, in the mesh's order of devices."""

    def __init__(self, text: str, axes: Sequence[tuple[str, int]]) -> None:
        self._axes = axes
        self._computations: dict[str, list[str]] = {}
        self._entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line)
            if header:
                lines = self._computations[header[2]] = []
                self._entry = header[2] if header[1] else self._entry
            else:
                lines.append(line)
        assert self._entry, "a compiled program has an entry"

    @cached_property
    def collectives(self) -> list[Collective]:
        """Every collective once, with how often it runs."""
        found: dict[tuple[str, ...], Collective] = {}
        for caller, inside, line, runs in self._executed(self._entry, 1):
            match = _INSTRUCTION.match(line)
            assert match, line
            operation = match[3].removesuffix("-start")
            if operation == "send" and (hosts := re.search(r'_xla_megascale_transfer_type="(\w+)"', line)):
                found[caller, "send", match[1]] = _between_slices(_of_hosts(hosts[1]), line, match[2], runs)
            if operation not in _OPERATIONS or match[3].endswith("-done"):
                continue
            # Between its start and its end a collective is copied into the computations that run meanwhile.
            channel = re.search(r"channel_id=(\d+)", line)
            own = match[1] if inside == caller else f"{channel and channel[1]} {match[2].split('{')[0]}"
            one = self._collective(operation, line, runs)
            if inside.startswith(f"%{_SCATTER}"):  # the slice comes after it
                one = one._replace(operation="reduce-scatter", result_bytes=one.result_bytes // one.members)
            found[caller, operation, own] = one
        return [one for one in found.values() if one.members > 1]

    @cached_property
    def cycles(self) -> int:
        """The compiler's estimate for one run of the program, of what it gives an estimate for."""
        return sum(
            runs * int(match[1])
            for caller, inside, line, runs in self._executed(self._entry, 1)
            if inside == caller and (match := re.search(r'"estimated_cycles":"(\d+)"', line))
        )

    def sent_by_axis(self) -> dict[str, int]:
        """Bytes that a chip sends, by mesh axis; `fsdp+tensor` where a collective runs along both."""
        sent: dict[str, int] = {}
        for one in self.collectives:
            name = "+".join(one.axes)
            sent[name] = sent.get(name, 0) + one.sent_bytes
        return sent

    def _executed(self, name: str, runs: int) -> Iterator[tuple[str, str, str, int]]:
        """(computation, computation inside a fusion or itself, instruction, runs) of all that runs."""
        for line in self._computations[name]:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            yield name, name, line, runs
            called = [part.strip() for group in _CALLED.findall(line) for part in (group[0] or group[1]).split(",")]
            if match[3] == "while":
                condition, body = (re.findall(rf"{part}=(%[\w.-]+)", line)[0] for part in ("condition", "body"))
                yield from self._executed(body, runs * self._trips(condition, body))
            elif match[3] in ("conditional", "call"):
                for part in called:
                    yield from self._executed(part, runs)
            elif match[3] in ("fusion", "async-start"):
                for part in called:
                    for inner in self._computations[part]:
                        if _INSTRUCTION.match(inner):
                            yield name, part, inner, runs

    def _trips(self, condition: str, body: str) -> int:
        """How often a loop runs whose counter begins at 0: to the constant that it is compared with, a constant more
        each time. One that passes arrays around a ring takes two steps a run.
        """
        test, after = self._instructions(condition), self._instructions(body)
        compared = test["ROOT"]
        counter, limit = compared.operands[0], self._constants(test, compared)
        place = re.search(r"index=(\d+)", test[counter].line) if counter in test else None
        step = self._constants(after, after[after["ROOT"].operands[int(place[1])]]) if place else []
        if "direction=LT" not in compared.line or len(limit) != 1 or len(step) != 1:
            raise ConfigError(
                f"the TPU's compiler wrote a loop whose runs a plan cannot count: {compared.line.strip()}"
            )
        return -(-limit[0] // step[0])

    def _instructions(self, computation: str) -> dict[str, _Instruction]:
        """Those of a computation by name; `ROOT` is its result."""
        found = {}
        for line in self._computations[computation]:
            if match := _INSTRUCTION.match(line):
                operands = re.findall(r"%[\w.-]+", line[match.end() :].partition(")")[0])
                found[f"%{match[1]}"] = one = _Instruction(match[3], operands, line)
                if line.lstrip().startswith("ROOT"):
                    found["ROOT"] = one
        return found

    @staticmethod
    def _constants(among: dict[str, _Instruction], one: _Instruction) -> list[int]:
        """The constants among an instruction's operands."""
        lines = [among[name].line for name in one.operands if name in among and among[name].operation == "constant"]
        return [int(found) for line in lines for found in re.findall(r" constant\((\d+)\)", line)]

    def _collective(self, operation: str, line: str, runs: int) -> Collective:
        match = _INSTRUCTION.match(line)
        assert match
        result = match[2]
        if match[3].endswith("-start") and result.startswith("("):
            result = result.split("), ")[-1]
        parts = [(kind, math.prod(map(int, filter(None, sizes.split(","))))) for kind, sizes in _arrays(result)]
        if match[3] == "collective-permute-start":
            parts = parts[1:2]  # operand, result, and two counters
        if match[3] == "all-gather-start":
            parts = parts[len(parts) // 2 :]
        group = self._group(line)
        return Collective(
            operation,
            self._along(group),
            frozenset(kind for kind, _ in parts),
            sum(_BYTES[kind] * size for kind, size in parts),
            len(group),
            runs,
        )

    def _group(self, line: str) -> list[int]:
        """The first group of devices, or the first pair that differs, as places in the mesh."""
        if found := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
            pairs = [list(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)\}?", found[1])]
            return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0][:1])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
            return list(map(int, found[1].split(",")))
        if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
            shape, sizes = (tuple(map(int, found[group].split(","))) for group in (1, 2))
            ids = np.arange(math.prod(sizes)).reshape(sizes)
            if found[3]:
                ids = ids.transpose(tuple(map(int, found[3].split(","))))
            return ids.reshape(shape)[0].tolist()
        found = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
        if found is None:
            return [0]
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = re.findall(r"'(\w+)'", found[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist()

    def _along(self, group: list[int]) -> tuple[str, ...]:
        """The mesh axes along which a group's members differ."""
        places = np.array(np.unravel_index(group, tuple(size for _, size in self._axes)))
        return tuple(name for (name, _), row in zip(self._axes, places, strict=True) if len(set(row.tolist())) > 1)


def _of_hosts(name: str) -> str:
    if name not in _HOSTS:
        raise ConfigError(
            f"--slices: the TPU's compiler lets hosts exchange {name}, which a plan cannot count. Plan for one slice, "
            "or with another backend.jax.mesh."
        )
    return _HOSTS[name]


def _between_slices(operation: str, line: str, result: str, runs: int) -> Collective:
    """What one send to a host has slices do, along the axis that may span them."""
    [kind, sizes], *_ = _arrays(result)
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', line)
    members = len(slices[1].split(",")) if slices else 2
    size = _BYTES[kind] * math.prod(map(int, sizes.split(",")))
    return Collective(operation, ("replica",), frozenset([kind]), size, members, runs)


def _arrays(result: str) -> list[tuple[str, str]]:
    return [found for found in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result) if found[0] in _BYTES]
