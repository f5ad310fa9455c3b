"""The run's endless prompt order: a seeded mixture that one integer, the cursor, resumes exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config.run import DataSection, DataSource
from common.config.section import ConfigError
from common.data.records import BadRecord, read_records
from common.types import Prompt


@dataclass(frozen=True)
class LoadedSource:
    """The usable prompts of one file, what was left out of it, each with its reason, and the file's SHA-256."""

    path: str
    prompts: tuple[Prompt, ...]
    weight: float
    bad: tuple[str, ...]
    long: tuple[str, ...]
    sha256: str


def load_source(section: DataSection, source: DataSource, length: Callable[[Prompt], int]) -> LoadedSource:
    """Read one file under the section's rules for bad and long records. `length` counts a prompt's tokens.

    Raises ConfigError for the first record that the rules do not let pass, or when nothing usable is left.
    """
    prompts, bad, long = [], [], []
    for record in read_records(Path(source.path), section.reference_key):
        if isinstance(record, BadRecord):
            if section.on_bad_record == "error":
                raise ConfigError(f"{record} Mend the record, or set data.on_bad_record to skip.")
            bad.append(str(record))
            continue
        try:
            tokens = length(record)
        except ConfigError as error:
            raise ConfigError(f"{source.path}: prompt {record.id!r}: {error}") from None
        if tokens > section.max_prompt_tokens:
            reason = f"{source.path}: prompt {record.id!r} has {tokens} tokens (limit {section.max_prompt_tokens})"
            if section.on_long_prompt == "error":
                raise ConfigError(f"{reason}. Raise data.max_prompt_tokens, or set data.on_long_prompt to drop.")
            long.append(reason)
            continue
        prompts.append(record)
    if not prompts:
        raise ConfigError(
            f"data file {source.path}: no usable record ({len(bad)} bad, {len(long)} too long). "
            "Mend the file, raise data.max_prompt_tokens, or take the file out of the data section."
        )
    with Path(source.path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return LoadedSource(source.path, tuple(prompts), source.weight, tuple(bad), tuple(long), sha256)


class Mixture:
    """Prompts of several sources in one endless, seeded order.

    An epoch holds each source's prompts `weight` times: whole copies, and for a fraction a share that moves on from
    epoch to epoch until every prompt had its turn. Each epoch is shuffled on its own. `mixture[cursor]` depends on the
    seed and the cursor alone, so a cursor is all there is to save.
    """

    def __init__(self, sources: Sequence[LoadedSource], seed: int) -> None:
        self.sources = tuple(sources)
        self._seed = seed
        self._sizes = [max(1, round(source.weight * len(source.prompts))) for source in sources]
        self._epoch: tuple[int, list[tuple[int, int]]] | None = None

    @property
    def epoch_size(self) -> int:
        """Draws in one epoch."""
        return sum(self._sizes)

    def __getitem__(self, cursor: int) -> Prompt:
        epoch, place = divmod(cursor, self.epoch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        source, index = self._epoch[1][place]
        return self.sources[source].prompts[index]

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        """(source, prompt) of every draw of an epoch, shuffled."""
        members = []
        for number, (source, size) in enumerate(zip(self.sources, self._sizes, strict=True)):
            first, count = epoch * size, len(source.prompts)
            passes = {
                index: self._pass(number, index) for index in range(first // count, (first + size - 1) // count + 1)
            }
            members += [(number, int(passes[draw // count][draw % count])) for draw in range(first, first + size)]
        shuffle = np.random.default_rng([self._seed, epoch, len(self.sources)])
        return [members[place] for place in shuffle.permutation(len(members))]

    def _pass(self, source: int, index: int) -> np.ndarray:
        """The order in which a source hands out its prompts in its pass number `index`."""
        return np.random.default_rng([self._seed, index, source]).permutation(len(self.sources[source].prompts))
