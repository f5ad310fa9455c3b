"""The trial of a config's judges: each is shown bad answers as they are, then dressed up by every family of attack."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from common.attack.cases import Case, base, labels_by_judge, read_cases, suitable
from common.attack.families import FAMILIES
from common.attack.report import (
    Attempt,
    JudgeResult,
    Report,
    family_results,
    judge_digest,
    refuse_over_limit,
    table,
    write_report,
)
from common.config.judging import JudgeSection
from common.config.load import LoadedConfig
from common.config.section import ConfigError
from common.config.sentences import sentence
from common.interrupt import INTERRUPTED, Interrupt
from common.reporting import CountingProgress, UnwatchedConsole
from common.rewards.judges.judge import Judge
from common.rewards.scorer import ScoreMissing
from common.rewards.threads import Verifying
from common.serving.in_process import OpenJudge
from common.serving.servers import Servers
from common.types import Missing, Score

_AT_ONCE = 64  # answers of each judge


class Options(NamedTuple):
    """What the command line says: judges to attack, all where none is named; base cases a judge, all where 0; the file
    to write, the config's where empty.
    """

    judges: list[str]
    samples: int
    out: str


class Response(NamedTuple):
    """A response to a case's question; family: None for the case's own."""

    case: Case
    family: str | None
    text: str


def attack(loaded: LoadedConfig, open_judge: OpenJudge, options: Options) -> int:
    """Attack the judges of a config, print the table and write the report; returns the exit status. A signal ends it
    without a report.

    Raises ConfigError for a judge or a file that cannot be used, and, once the report is written, for a family that
    gains more than the config allows; ScoreMissing for a judge that scores none of its base cases.
    """
    out = Path(options.out or loaded.config.rewards.attack_report)
    if not out.absolute().parent.is_dir():
        key = "--out" if options.out else "rewards.attack_report ="
        raise ConfigError(f"{key} {out}: no such folder. Make it, or give another path.")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder. Give the path of a file for the report.")
    cases, sha256 = read_cases(loaded.config.rewards.attack_cases, loaded.origin)
    chosen = _chosen(loaded, cases, options)
    with closing(Servers(loaded, open_judge)) as servers:
        sections = {name: loaded.config.rewards.judges[name] for name in chosen}
        judges = {name: Judge(name, section, servers.open(section.server)) for name, section in sections.items()}
        attempts = _attempts(judges, chosen, loaded.config.rewards.deadline_s)
    if attempts is None:
        print("stopped; no report was written", file=sys.stderr)
        return INTERRUPTED
    labels = labels_by_judge(loaded.config.rewards)
    report = Report(
        cases=loaded.config.rewards.attack_cases,
        cases_sha256=sha256,
        judges={name: _result(judge, labels[name], attempts[name]) for name, judge in judges.items()},
        attempts=[attempt for those in attempts.values() for attempt in those],
    )
    console = UnwatchedConsole()
    console.print(table(report))
    write_report(report, out)
    console.print(f"{out}: {len(report.attempts)} attempts", highlight=False, markup=False, soft_wrap=True)
    refuse_over_limit(loaded, report.judges, out)
    return 0


def _chosen(loaded: LoadedConfig, cases: Sequence[Case], options: Options) -> dict[str, list[Case]]:
    """The judges to attack and the cases of each, `options.samples` of them from all over the file."""
    rewards, labels = loaded.config.rewards, labels_by_judge(loaded.config.rewards)
    where = loaded.origin("rewards.recipe")
    if not labels:
        raise ConfigError(
            f"rewards.recipe ({where}): uses no judge, so there is nothing to attack. Include one that does."
        )
    for name in options.judges:
        if name not in labels:
            raise ConfigError(
                f"--judge {name}: the recipe uses no such judge. Choose one of {', '.join(sorted(labels))}."
            )
    chosen = {}
    for name in options.judges or labels:
        found = suitable(cases, rewards.judges[name], labels[name])
        if not found:
            raise ConfigError(_no_cases(loaded, name, labels[name], rewards.judges[name]))
        count = min(options.samples or len(found), len(found))
        chosen[name] = [found[index * len(found) // count] for index in range(count)]
    return chosen


def _no_cases(loaded: LoadedConfig, name: str, labels: Sequence[str], judge: JudgeSection) -> str:
    with_one, path = "with" if judge.compares else "without", loaded.config.rewards.attack_cases
    problem = (
        f"no case {with_one} a reference has a label of judge {name!r} ({', '.join(labels)}). Add some, or name the "
        "other judges with --judge."
    )
    return sentence("rewards.attack_cases", path, loaded.origin("rewards.attack_cases"), problem)


def _attempts(
    judges: dict[str, Judge], chosen: dict[str, list[Case]], deadline_s: float
) -> dict[str, list[Attempt]] | None:
    """Every judge's attempts, scored by all judges side by side; None where a signal came first."""
    responses = {name: list(_responses(judge.section, chosen[name])) for name, judge in judges.items()}
    samples = {name: [each.case.sample(each.text) for each in those] for name, those in responses.items()}
    verifying, total = Verifying(judges, deadline_s), sum(map(len, samples.values()))
    scores: dict[str, list[Score | Missing]] = {name: [] for name in judges}
    with (
        Interrupt("part of the attack") as interrupt,
        CountingProgress(UnwatchedConsole(), "answers", 0, total) as shown,
    ):
        for start in range(0, max(map(len, samples.values())), _AT_ONCE):
            if interrupt.requested:
                return None
            part = verifying.results({name: those[start : start + _AT_ONCE] for name, those in samples.items()})
            for name, found in part.items():
                scores[name] += found
            missing = sum(isinstance(score, Missing) for those in scores.values() for score in those)
            shown.advance(sum(map(len, part.values())), missing)
    return {name: attempts(name, responses[name], scores[name]) for name in judges}


def _responses(judge: JudgeSection, cases: Sequence[Case]) -> Iterator[Response]:
    for case in cases:
        yield Response(case, None, case.response)
        plain = base(case, judge)
        for family, attacked in FAMILIES.items():
            yield from (Response(case, family, text) for text in attacked(plain))


def attempts(judge: str, responses: Sequence[Response], scores: Sequence[Score | Missing]) -> list[Attempt]:
    """What each response was given, and what it gained on the case's own. Raises ScoreMissing when no case has a score
    to gain on.
    """
    own = {
        response.case.id: score for response, score in zip(responses, scores, strict=True) if response.family is None
    }
    lost = [score for score in own.values() if isinstance(score, Missing)]
    if len(lost) == len(own):
        raise ScoreMissing(
            f"judge {judge!r}: none of its {len(own)} base cases has a score, the first because {lost[0].reason}."
        )
    return [
        Attempt(
            judge=judge,
            case=response.case.id,
            family=response.family,
            prompt=response.case.prompt,
            response=response.text,
            score=score.value if isinstance(score, Score) else None,
            evidence=score.evidence if isinstance(score, Score) else score.reason,
            gain=_gain(score, own[response.case.id]),
        )
        for response, score in zip(responses, scores, strict=True)
    ]


def _gain(score: Score | Missing, own: Score | Missing) -> float | None:
    return None if isinstance(score, Missing) or isinstance(own, Missing) else score.value - own.value


def _result(judge: Judge, labels: list[str], attempts: Sequence[Attempt]) -> JudgeResult:
    own = [attempt.score for attempt in attempts if attempt.family is None]
    scored = [score for score in own if score is not None]
    return JudgeResult(
        digest=judge_digest(judge.section),
        model=judge.model.identity,
        labels=labels,
        base_score=sum(scored) / len(scored),
        base_cases=len(own),
        base_missing=len(own) - len(scored),
        families=family_results(attempts),
    )
