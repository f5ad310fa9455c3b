"""The tests themselves under test: small numeric bugs, planted one at a time in a copy of the source tree, and each of
them caught, by the named test of the algorithms or by a rung of the ladder between the engines.

The engines without bugs are measured once; a bug costs one further measurement.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.parity.engine_mutants import ENGINE_MUTANTS
from tests.parity.mutants import ALGORITHM_MUTANTS, Mutant
from tests.parity.mutation import ALGORITHMS, ENGINES, ENVIRONMENT, Bench, copy_tree, make_bench, mutated_text
from tests.parity.warm import warmed

MUTANTS = (*ALGORITHM_MUTANTS, *ENGINE_MUTANTS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The recording, and both engines' measurements of it from copies without bugs."""
    with warmed(**ENVIRONMENT) as warm:
        made = make_bench(tmp_path_factory.mktemp("mutations"), warm)
        for engine in ENGINES:
            tree = copy_tree(made.folder / f"tree-{engine}", None)
            made.measure(tree, f"safework_{engine}/trainer.py", engine, made.measurement(engine))
        yield made


def test_a_copy_without_bugs_passes_every_test_of_the_algorithms(bench: Bench) -> None:
    tree = copy_tree(bench.folder / "tree-common", None)
    done = bench.tests(tree, "common/algorithms/losses.py", ALGORITHMS)
    assert done.returncode == 0, done.stdout


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
def test_mutant_is_caught(mutant: Mutant, bench: Bench) -> None:
    verdict = bench.verdict(mutant)
    assert verdict.caught, (
        f"{mutant.name} should be caught by {mutant.caught_by!r}, but what is said is:\n{verdict.text}"
    )
