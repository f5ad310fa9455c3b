"""The tests themselves under test: small numeric bugs, planted one at a time in a copy of the source tree, and each of
them caught, by the named test of the algorithms or by a rung of the ladder between the engines.

Two processes run at a time. The engines without bugs are measured once; a bug costs one further measurement.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.parity.engine_mutants import ENGINE_MUTANTS
from tests.parity.mutants import ALGORITHM_MUTANTS, Mutant
from tests.parity.mutation import ALGORITHMS, ENGINES, Bench, Verdict, copy_tree, make_bench, mutated_text

WORKERS = 2
MUTANTS = (*ALGORITHM_MUTANTS, *ENGINE_MUTANTS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The recording, and both engines' measurements of it from copies without bugs."""
    made = make_bench(tmp_path_factory.mktemp("mutations"))

    def measure(engine: str) -> None:
        tree = copy_tree(made.folder / f"tree-{engine}", None)
        made.measure(tree, f"safework_{engine}/trainer.py", engine, made.measurement(engine))

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(measure, ENGINES))
    return made


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, bench: Bench) -> Iterator[dict[str, Future[Verdict]]]:
    """The verdicts on the mutants of this session's selection, worked out in the background in their order."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    selected = [call.params["mutant"] for call in calls if call is not None and "mutant" in call.params]
    pool = ThreadPoolExecutor(WORKERS)
    yield {mutant.name: pool.submit(bench.verdict, number, mutant) for number, mutant in enumerate(selected)}
    pool.shutdown(cancel_futures=True)


def test_a_copy_without_bugs_passes_every_test_of_the_algorithms(bench: Bench) -> None:
    tree = copy_tree(bench.folder / "tree-common", None)
    done = bench.tests(tree, "common/algorithms/losses.py", ALGORITHMS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_engines_without_bugs_pass_every_rung(bench: Bench) -> None:
    rungs = bench.rungs("torch", bench.measurement("torch"))
    assert len(rungs) > 10
    assert [rung for rung in rungs if not rung.passed] == []


def test_mutants_differ_and_are_python() -> None:
    texts = {mutant.name: mutated_text(mutant) for mutant in MUTANTS}
    assert len(texts) == len(set(texts.values())) == len(MUTANTS)
    for text in texts.values():
        ast.parse(text)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, verdicts: dict[str, Future[Verdict]]) -> None:
    verdict = verdicts[mutant.name].result()
    assert verdict.caught, (
        f"{mutant.name} should be caught by {mutant.caught_by!r}, but what is said is:\n{verdict.text}"
    )
