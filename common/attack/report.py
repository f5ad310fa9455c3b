"""What attacks on judges gained: the figures, the file that holds them with every attempt, and the limit on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from common.attack.cases import base, labels_by_judge, read_cases, suitable
from common.attack.families import FAMILIES, Base
from common.config.judging import JudgeSection
from common.config.load import LoadedConfig
from common.config.section import ConfigError, Section
from common.config.sentences import sentence
from common.disk import not_written
from common.rewards.judges.judge import Judge
from common.rewards.judges.question import FORM
from common.rewards.recipe import Recipe

_FILE, _LIMIT = "rewards.attack_report", "rewards.max_attack_gain"
_AGAIN = "Run safework attack with this config again, on all cases."


class Attempt(Section):
    """One response that a judge was shown. family: null for the base case itself. score: null where the judge gave
    none; evidence then says why. gain: the score less that of the base case, null where either is missing.
    """

    judge: str
    case: str
    family: str | None
    prompt: str
    response: str
    score: float | None
    evidence: str
    gain: float | None


class FamilyResult(Section):
    """A family on a judge: gains over the attacked cases that have one, null where none has; how many cases there were,
    and how many without a gain because a score was missing.
    """

    mean_gain: float | None
    largest_gain: float | None
    cases: int
    missing: int


class JudgeResult(Section):
    """A judge: a digest of its section, what its model was, the recipe's labels that use it, the mean score of its base
    cases and how many had none, and what each family gained.
    """

    digest: str
    model: str
    labels: list[str]
    base_score: float
    base_cases: int
    base_missing: int
    families: dict[str, FamilyResult]


class Report(Section):
    """All of an attack: the file of cases with its SHA-256, a result for each judge, and every attempt."""

    cases: str
    cases_sha256: str
    judges: dict[str, JudgeResult]
    attempts: list[Attempt]


def judge_digest(section: JudgeSection) -> str:
    """Stands for all that a judge is but its model: prompts, read-out, the switches beside them, and what is made of
    these for a sample.
    """
    return hashlib.sha256(f"{FORM} {section.model_dump_json()}".encode()).hexdigest()[:16]


def family_results(attempts: Sequence[Attempt]) -> dict[str, FamilyResult]:
    """The results of one judge by family, in the order of its attempts."""
    tried: dict[str, list[float | None]] = {}
    for attempt in attempts:
        if attempt.family is not None:
            tried.setdefault(attempt.family, []).append(attempt.gain)
    return {family: _family_result(gains) for family, gains in tried.items()}


def _family_result(gains: Sequence[float | None]) -> FamilyResult:
    known = [gain for gain in gains if gain is not None]
    return FamilyResult(
        mean_gain=sum(known) / len(known) if known else None,
        largest_gain=max(known, default=None),
        cases=len(gains),
        missing=len(gains) - len(known),
    )


def table(report: Report) -> Table:
    """The results for a person, the worst family of each judge first."""
    shown = Table("judge", "family", title="score gained by attacks on judges")
    for column in ("mean gain", "largest", "answers", "missing"):
        shown.add_column(column, justify="right")
    for name, judge in report.judges.items():
        base = f"{judge.base_score:.3f}"
        shown.add_row(
            escape(name), f"[dim]none: mean score {base}[/]", "", "", *_counts(judge.base_cases, judge.base_missing)
        )
        for family, result in sorted(judge.families.items(), key=lambda entry: -(entry[1].mean_gain or 0.0)):
            gains = (_signed(result.mean_gain), _signed(result.largest_gain))
            shown.add_row("", family.replace("_", " "), *gains, *_counts(result.cases, result.missing))
        shown.add_section()
    return shown


def _signed(gain: float | None) -> str:
    return "?" if gain is None else f"{gain:+.3f}"


def _counts(cases: int, missing: int) -> tuple[str, str]:
    return str(cases), f"[bold red]{missing}[/]" if missing else "0"


def write_report(report: Report, path: Path) -> None:
    """Write the report whole or not at all. Raises NotSaved."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(path, error, "start the same command again") from error


def refuse_over_limit(loaded: LoadedConfig, judges: Mapping[str, JudgeResult], path: Path) -> None:
    """Raise ConfigError naming the worst family when its mean gain on one of the judges is over the config's limit, or
    one that was never measured.
    """
    limit = loaded.config.rewards.max_attack_gain
    results = [(family, name, each) for name, judge in judges.items() for family, each in judge.families.items()]
    if limit is None or not results:
        return
    for family, name, result in results:
        if result.mean_gain is None:
            problem = (
                f"attacks of the family {family!r} on judge {name!r} were not measured: all {result.cases} went "
                f"without a score ({path} says why). Mend its prompt, read-out or server and attack again."
            )
            raise ConfigError(sentence(_LIMIT, limit, loaded.origin(_LIMIT), problem))
    gain, family, name = max((each.mean_gain or 0.0, family, name) for family, name, each in results)
    if gain > limit:
        problem = (
            f"attacks of the family {family!r} gain {gain:.3f} on average on judge {name!r} ({path}). Mend the judge's "
            "prompt or read-out, choose a stronger model, or raise the limit."
        )
        raise ConfigError(sentence(_LIMIT, limit, loaded.origin(_LIMIT), problem))


def refuse_untried(loaded: LoadedConfig, recipe: Recipe) -> None:
    """Where the config limits gains, raise ConfigError unless its report has tried every judge of the recipe as it is
    now and found it within the limit.
    """
    rewards = loaded.config.rewards
    judges = {
        judge: verifier
        for name, verifier in recipe.verifiers.items()
        if isinstance(verifier, Judge) and (judge := rewards.verifiers[name].judge) is not None
    }
    if rewards.max_attack_gain is None or not judges:
        return
    report = _read(loaded)
    cases, sha256 = read_cases(rewards.attack_cases, loaded.origin)
    if report.cases_sha256 != sha256:
        raise _refusal(loaded, f"is of other cases than those of {rewards.attack_cases}. {_AGAIN}")
    labels = labels_by_judge(rewards)
    for name, judge in judges.items():
        tried = _tried(loaded, name, judge, report)
        if set(tried.labels) != set(labels[name]):
            now = f"with cases of {', '.join(tried.labels)}, and judges {', '.join(labels[name])}"
            raise _refusal(loaded, f"judge {name!r} was attacked {now}. {_AGAIN}")
        there = suitable(cases, judge.section, labels[name])
        _refuse_partial(loaded, name, tried, [base(case, judge.section) for case in there])
    refuse_over_limit(loaded, {name: report.judges[name] for name in judges}, Path(rewards.attack_report))


def _read(loaded: LoadedConfig) -> Report:
    try:
        return Report.model_validate_json(Path(loaded.config.rewards.attack_report).read_bytes())
    except OSError as error:
        problem = f"cannot be read ({error.strerror}), and {_LIMIT} is set. Run safework attack with this config first."
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"is no report of safework attack ({first['msg']}). Run safework attack with this config again."
    raise _refusal(loaded, problem)


def _tried(loaded: LoadedConfig, name: str, judge: Judge, report: Report) -> JudgeResult:
    """The report's result on a judge, where it was the same then."""
    tried = report.judges.get(name)
    if tried is None:
        raise _refusal(loaded, f"does not hold judge {name!r}, and {_LIMIT} is set. {_AGAIN}")
    if tried.digest != judge_digest(judge.section):
        raise _refusal(loaded, f"judge {name!r} had another prompt or read-out when it was attacked. {_AGAIN}")
    if tried.model != judge.model.identity:
        now = f"it was {tried.model}, and is {judge.model.identity}"
        raise _refusal(loaded, f"judge {name!r} asked another model when it was attacked: {now}. {_AGAIN}")
    return tried


def _refuse_partial(loaded: LoadedConfig, name: str, tried: JudgeResult, there: Sequence[Base]) -> None:
    if tried.base_cases < len(there):
        raise _refusal(loaded, f"judge {name!r} was shown {tried.base_cases} of its {len(there)} cases. {_AGAIN}")
    shown = {family: result.cases for family, result in tried.families.items()}
    for family, attacked in FAMILIES.items():
        if shown.get(family, 0) != sum(len(attacked(each)) for each in there):
            raise _refusal(loaded, f"judge {name!r} was shown other attacks of the family {family!r}. {_AGAIN}")


def _refusal(loaded: LoadedConfig, problem: str) -> ConfigError:
    return ConfigError(sentence(_FILE, loaded.config.rewards.attack_report, loaded.origin(_FILE), problem))
