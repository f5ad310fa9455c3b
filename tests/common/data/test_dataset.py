"""The prompt order: what a file contributes, mixtures by weight, seeded epochs, and a cursor that resumes exactly."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ConfigError
from common.config.run import DataSection, DataSource
from common.data.dataset import LoadedSource, Mixture, load_source
from common.types import Message, Prompt


def prompts(count: int, name: str = "p") -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{name}{index}", "l", (Message("user", str(index)),)) for index in range(count))


def mixture(seed: int = 0, **sources: tuple[int, float]) -> Mixture:
    """A mixture of sources by name, each with a number of prompts and a weight."""
    loaded = [LoadedSource(name, prompts(count, name), weight, (), (), "") for name, (count, weight) in sources.items()]
    return Mixture(loaded, seed)


def epoch(mixed: Mixture, number: int = 0) -> list[str]:
    """Prompt ids of an epoch in order."""
    return [mixed[number * mixed.epoch_size + place].id for place in range(mixed.epoch_size)]


def load(folder: Path, *records: Any, weight: float = 1.0, **section: Any) -> LoadedSource:
    """Records written to a file and loaded with a data section; a prompt has as many tokens as characters."""
    file = folder / "data.jsonl"
    file.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    source = DataSource(path=str(file), weight=weight)
    return load_source(DataSection(train=[source], **section), source, lambda prompt: len(prompt.messages[0].content))


def record(text: str) -> dict[str, str]:
    return {"id": text[:8], "prompt": text, "label": "l"}


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_contributes_its_prompts_in_order(tmp_path: Path) -> None:
    source = load(tmp_path, record("a"), record("b"), weight=0.5)
    assert [prompt.id for prompt in source.prompts] == ["a", "b"]
    assert (source.path, source.weight, source.bad, source.long) == (str(tmp_path / "data.jsonl"), 0.5, (), ())


def test_bad_record_is_an_error_unless_skipped_and_counted(tmp_path: Path) -> None:
    records = [record("a"), "{", record("b"), {"prompt": "no label"}]
    file = tmp_path / "data.jsonl"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *records)
    assert str(caught.value).startswith(f"{file}:2: not valid JSON")
    assert str(caught.value).endswith("Mend the record, or set data.on_bad_record to skip.")
    source = load(tmp_path, *records, on_bad_record="skip")
    assert [prompt.id for prompt in source.prompts] == ["a", "b"]
    assert [reason.split(": ")[0] for reason in source.bad] == [f"{file}:2", f"{file}:4"]


def test_long_prompt_is_dropped_and_counted_or_an_error(tmp_path: Path) -> None:
    records = [record("abcde"), record("abcdef"), record("abcdefg")]
    file = tmp_path / "data.jsonl"
    source = load(tmp_path, *records, max_prompt_tokens=5)
    assert [prompt.id for prompt in source.prompts] == ["abcde"]
    assert source.long == (
        f"{file}: prompt 'abcdef' has 6 tokens (limit 5)",
        f"{file}: prompt 'abcdefg' has 7 tokens (limit 5)",
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *records, max_prompt_tokens=5, on_long_prompt="error")
    remedy = "Raise data.max_prompt_tokens, or set data.on_long_prompt to drop."
    assert str(caught.value) == f"{file}: prompt 'abcdef' has 6 tokens (limit 5). {remedy}"


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "{", record("long"), on_bad_record="skip", max_prompt_tokens=1)
    start = f"data file {tmp_path / 'data.jsonl'}: no usable record (1 bad, 1 too long). Mend the file"
    assert str(caught.value).startswith(start)


def test_a_refusing_chat_template_is_told_with_file_and_prompt(tmp_path: Path) -> None:
    def refuse(prompt: Prompt) -> int:
        raise ConfigError(f"no {len(prompt.messages)} turns, please.")

    load(tmp_path, record("a"))
    source = DataSource(path=str(tmp_path / "data.jsonl"))
    with pytest.raises(ConfigError) as caught:
        load_source(DataSection(train=[source]), source, refuse)
    assert str(caught.value) == f"{source.path}: prompt 'a': no 1 turns, please."


def test_reference_key_reaches_the_records(tmp_path: Path) -> None:
    source = load(tmp_path, {**record("a"), "solution": "42"}, reference_key="solution")
    assert source.prompts[0].reference == "42"


# Mixtures -------------------------------------------------------------------------------------------------------------


def test_every_prompt_once_an_epoch_at_weight_1() -> None:
    mixed = mixture(a=(7, 1.0), b=(5, 1.0))
    assert mixed.epoch_size == 12
    for number in range(4):
        assert sorted(epoch(mixed, number)) == sorted([f"a{i}" for i in range(7)] + [f"b{i}" for i in range(5)])


def test_whole_weights_repeat_every_prompt() -> None:
    mixed = mixture(a=(4, 2.0), b=(3, 1.0))
    assert Counter(epoch(mixed)) == Counter({**{f"a{i}": 2 for i in range(4)}, **{f"b{i}": 1 for i in range(3)}})


def test_half_a_source_an_epoch_rotates_until_each_prompt_had_its_turn() -> None:
    mixed = mixture(a=(10, 0.5), b=(1, 1.0))
    assert mixed.epoch_size == 6
    for number in range(0, 8, 2):
        first, second = set(epoch(mixed, number)) - {"b0"}, set(epoch(mixed, number + 1)) - {"b0"}
        assert (len(first), len(second)) == (5, 5)
        assert first.isdisjoint(second)
    assert len({frozenset(epoch(mixed, number)) for number in range(8)}) > 2


def test_weight_one_and_a_half() -> None:
    mixed = mixture(a=(10, 1.5))
    assert mixed.epoch_size == 15
    for number in range(4):
        assert sorted(Counter(epoch(mixed, number)).values()) == [1] * 5 + [2] * 5
    two = Counter(epoch(mixed, 0) + epoch(mixed, 1))
    assert set(two.values()) == {3}


def test_the_smallest_weight_still_gives_a_prompt() -> None:
    mixed = mixture(a=(3, 0.01), b=(3, 1.0))
    seen = Counter(name for number in range(6) for name in epoch(mixed, number) if name.startswith("a"))
    assert seen == {"a0": 2, "a1": 2, "a2": 2}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch(mixture(seed, a=(50, 1.0)), number) for seed in (0, 1) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert orders[0] != sorted(orders[0])
    assert orders[0] == epoch(mixture(0, a=(50, 1.0)))


def test_the_order_never_changes() -> None:
    mixed = mixture(3, a=(3, 1.0), b=(4, 0.5))
    frozen = "a0 a1 b2 b0 a2 b3 a0 a2 b1 a1"
    assert [mixed[cursor].id for cursor in range(10)] == frozen.split()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.3])), min_size=1, max_size=3),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 60),
)
def test_a_cursor_resumes_exactly(sizes: list[tuple[int, float]], seed: int, start: int) -> None:
    sources = {f"s{number}-": size for number, size in enumerate(sizes)}
    whole = [mixture(seed, **sources)[cursor].id for cursor in range(start, start + 30)]
    stopped = mixture(seed, **sources)
    rest = [stopped[cursor].id for cursor in range(start, start + 30)]
    backwards = [stopped[cursor].id for cursor in reversed(range(start, start + 30))]
    assert whole == rest == backwards[::-1]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 30), weight=st.floats(0.05, 3.0), seed=st.integers(0, 99))
def test_over_many_epochs_prompts_of_a_source_come_equally_often(count: int, weight: float, seed: int) -> None:
    mixed = mixture(seed, a=(count, weight))
    seen: Counter[str] = Counter()
    for number in range(12):
        seen.update(epoch(mixed, number))
        counts = [seen[f"a{index}"] for index in range(count)]
        assert max(counts) - min(counts) <= 1
    assert sum(counts) == 12 * mixed.epoch_size
    assert abs(mixed.epoch_size - weight * count) <= max(0.5, 1 - weight * count)


def test_a_large_data_set_is_read_quickly() -> None:
    source = LoadedSource("a", prompts(100_000, "a"), 1.0, (), (), "")
    started = time.perf_counter()
    mixed = Mixture([source], seed=0)
    ids = {mixed[cursor].id for cursor in range(mixed.epoch_size)}
    assert len(ids) == 100_000
    assert time.perf_counter() - started < 2
