"""Scoring a file: its records in chunks to the verifiers of their labels, their scores to a file, a summary behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, LoadedConfig
from common.disk import not_written
from common.interrupt import INTERRUPTED, Interrupt
from common.reporting import CountingProgress, UnwatchedConsole
from common.rewards.recipe import Recipe
from common.rewards.scorer import ScoreMissing, Scorer, what_is_missing
from common.scoring.entries import Entry, Reader
from common.scoring.naming import Naming
from common.scoring.scores_file import Line, Name, ScoresFile, one_of_each
from common.scoring.summary import Summary, summarise
from common.scoring.tables import tables
from common.serving.in_process import OpenJudge
from common.serving.servers import Servers
from common.team import alone
from common.types import Missing

CHUNK = 256
_WIDTH = 140  # of tables that no terminal limits


@dataclass(frozen=True)
class Job:
    """What is scored, a file or a run's folder, and where to; `label` is for records without one. `command` goes on."""

    file: Path
    out: Path
    label: str | None
    command: str


def score(loaded: LoadedConfig, open_judge: OpenJudge, job: Job) -> int:
    """Score what of the file has no score yet, and sum up all of it; returns the exit status.

    Raises ConfigError for bad records, labels or a foreign `out`, ServerError, NotSaved, and, with everything written,
    ScoreMissing when more scores are missing than `rewards.max_missing`.
    """
    entries = Reader(loaded, job.label).read(job.file)
    with suppress(KeyboardInterrupt):
        with closing(_recipe(loaded, open_judge, entries, job.file)) as recipe:
            naming = Naming(loaded, recipe)
            names = [naming.name(entry) for entry in entries]
            lines = _score_all(Scorer(recipe, loaded.config.rewards, alone()), entries, names, job.out)
        if None not in lines:
            _sum_up(loaded, job, entries, [line for line in lines if line is not None])
            return 0
    print(f"stopped; the records scored so far are in {job.out}. To go on: {job.command}", file=sys.stderr)
    return INTERRUPTED


def _recipe(loaded: LoadedConfig, open_judge: OpenJudge, entries: Sequence[Entry], file: Path) -> Recipe:
    """The recipe of the labels that the entries have, its verifiers opened, with every prompt accepted by them."""
    servers = Servers(loaded, open_judge)
    prompts = [entry.sample.prompt for entry in entries]
    recipe = Recipe(loaded.config.rewards, servers, (prompt.label for prompt in prompts), loaded.origin)
    try:
        for prompt in prompts:
            recipe.check(prompt)
    except ConfigError as error:
        recipe.close()
        raise ConfigError(f"{file}: {error}") from None
    return recipe


def _score_all(scorer: Scorer, entries: Sequence[Entry], names: Sequence[Name], out: Path) -> list[Line | None]:
    """A line for each entry, None where a signal came first. Whole chunks are in the file."""
    console = UnwatchedConsole()
    with closing(ScoresFile(out)) as file, Interrupt("chunk of records") as interrupt:
        lines = one_of_each(names, file.resume(names))
        left = [place for place, line in enumerate(lines) if line is None]
        if len(left) < len(lines):
            known = f"{out}: {len(lines) - len(left)} of {len(lines)} records are scored already"
            console.print(known, markup=False, soft_wrap=True)
        with CountingProgress(console, "records", len(lines) - len(left), len(lines)) as progress:
            missing = 0
            for start in range(0, len(left), CHUNK):
                if interrupt.requested:
                    break
                places = left[start : start + CHUNK]
                new = _score_chunk(scorer, [entries[place] for place in places], [names[place] for place in places])
                file.append(new)
                for place, line in zip(places, new, strict=True):
                    lines[place] = line
                missing += sum(len(line.missing) for line in new)
                progress.advance(len(new), missing)
    return lines


def _score_chunk(scorer: Scorer, entries: Sequence[Entry], names: Sequence[Name]) -> list[Line]:
    lines = []
    results = scorer.results([entry.sample for entry in entries])
    for entry, name, found in zip(entries, names, results, strict=True):
        label = entry.sample.prompt.label
        complete = not any(isinstance(result, Missing) for result in found.values())
        lines.append(Line(name, label, scorer.recipe.reward(label, found).total if complete else None, found))
    return lines


def _sum_up(loaded: LoadedConfig, job: Job, entries: Sequence[Entry], lines: Sequence[Line]) -> None:
    """Show and write the summary. Raises ScoreMissing when too many scores are missing."""
    summary = summarise(entries, lines, loaded.config.rewards)
    file = job.out.with_name(f"{job.out.name.removesuffix('.jsonl')}.summary.json")
    _write(summary, file, job)
    console = UnwatchedConsole()
    if not console.is_terminal:
        console.width = _WIDTH
    for table in tables(summary):
        console.print(table)
    written = f"{job.out}: {len(lines)} records scored; {file}: this summary"
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    limit = loaded.config.rewards.max_missing
    if summary.missing > limit:
        raise ScoreMissing(
            f"{what_is_missing([line.results for line in lines])}. Limit is {limit} in all (rewards.max_missing). "
            "The same command asks for them again; or raise the limit."
        )


def _write(summary: Summary, file: Path, job: Job) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        text = json.dumps({"file": str(job.file), **summary.to_json()}, ensure_ascii=False, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(file, error, "start the same command again", f"all scores are in {job.out}") from error
