"""The smallest change of a config that makes a plan fit which does not: each change alone, then one more each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config import ConfigError, LoadedConfig
from common.plan.report import Plan, progress

# Dotted keys and their values, of the types that a config has.
Settings = dict[str, Any]
# Plans some parts of a config.
Planned = Callable[[LoadedConfig, tuple[str, ...]], Plan]
# What a config may still change to take less memory, the cheapest first.
Changes = Callable[[LoadedConfig], Iterator[Settings]]


def with_remedy(loaded: LoadedConfig, parts: tuple[str, ...], planned: Planned, changes: Changes, how: str) -> Plan:
    """The plan of a config and, where that does not fit, with a note of the smallest change that does.

    parts: of PARTS, those to plan. how: the way of looking at them, such as `counted`.
    """
    found = planned(loaded, parts)
    if found.fits:
        return found
    search = _Search(loaded, parts, planned, found.too_large)
    if settings := search.smallest(changes):
        note = f"It fits with {words(settings)}: {how} and checked."
    elif search.tried:
        note = f"Nothing that was {how} fits: {'; '.join(search.tried)}. It may need more chips, or larger ones."
    else:
        note = "No smaller setting is left to try. It may need more chips, or larger ones."
    return found._replace(notes=(note, *found.notes))


def words(settings: Settings) -> str:
    """Settings as a command line has them."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    )


def less_memory(loaded: LoadedConfig, fewest_rows: int) -> Iterator[Settings]:
    """What every engine can change; a micro-batch has at least `fewest_rows`."""
    config = loaded.config
    if config.batch.rows_per_microbatch > fewest_rows:
        yield {"batch.rows_per_microbatch": fewest_rows}
    if config.backend.recompute != "full":
        yield {"backend.recompute": "full"}
    if not config.backend.offload_optimizer:
        yield {"backend.offload_optimizer": True}
    if config.loss.kl_coef and not config.backend.offload_reference:
        yield {"backend.offload_reference": True}


class _Search:
    """Tries settings on a config of which some parts are too large, and keeps what it tried, in words."""

    def __init__(self, loaded: LoadedConfig, parts: tuple[str, ...], planned: Planned, too_large: set[str]) -> None:
        self._loaded, self._planned, self._too_large = loaded, planned, too_large
        # One that was too large and still is settles it, without the others.
        self._parts = sorted(parts, key=lambda part: part not in too_large)
        self.tried: list[str] = []

    def smallest(self, changes: Changes) -> Settings | None:
        """Fewer rows of sampling, if that is too large; with these one change; then one more each time, without those
        that prove needless.
        """
        samples, have_room = self._fewer_samples()
        if have_room and self._too_large == {"sampling"}:
            return samples
        base = samples if have_room else {}
        alone = list(changes(self._loaded.with_settings(base)))
        for change in alone:
            if self._fits(base | change):
                return base | change
        # Fewer rows that are not enough for sampling may be, with others.
        chain = [samples] if samples and not have_room else alone[:1]
        while change := next(changes(self._loaded.with_settings(_merged([base, *chain]))), None):
            chain.append(change)
            if self._fits(_merged([base, *chain])):
                return _merged([base, *self._needed(base, chain)])
        return None

    def _fewer_samples(self) -> tuple[Settings, bool]:
        """A quarter or a sixteenth of sampling's rows, if that is too large; and whether it then fits. Nothing else
        hangs on these rows.
        """
        settings: Settings = {}
        if "sampling" in self._too_large:
            for rows in filter(None, (self._loaded.config.rollout.rows // part for part in (4, 16))):
                settings = {"rollout.rows": rows}
                if self._fits(settings, ("sampling",)):
                    return settings, True
        return settings, False

    def _fits(self, settings: Settings, parts: Sequence[str] = ()) -> bool:
        """Whether some parts fit, or all."""
        self.tried.append(words(settings))
        progress(f"trying {self.tried[-1]}")
        changed = self._loaded.with_settings(settings)
        try:
            return all(self._planned(changed, (part,)).fits for part in parts or self._parts)
        except ConfigError as error:  # the model has no such split, say
            progress(f"which is refused: {error}")
            return False

    def _needed(self, base: Settings, chain: list[Settings]) -> list[Settings]:
        """Changes that fit together, less those that the others fit without."""
        for change in chain[:-1]:
            others = [other for other in chain if other is not change]
            stands_alone = not any(change.keys() & other.keys() for other in others)
            if stands_alone and self._fits(_merged([base, *others])):
                chain = others
        return chain


def _merged(chain: list[Settings]) -> Settings:
    return {key: value for settings in chain for key, value in settings.items()}
