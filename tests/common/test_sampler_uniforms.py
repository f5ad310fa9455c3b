"""Every sampled token has its own number, fixed by where it stands and by nothing else; and what ends a response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ConfigError
from common.config.run import RolloutSection
from common.data.chat import Chat
from common.rollout.sampler import Draw, RolloutSampler, sampling_rule, uniforms
from common.trainer import Response, Sampling, SamplingPrompt
from common.types import Message, Prompt
from tests.chat_models import DEEPSEEK_R1, make_chat_folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_chat_folder(tmp_path_factory.mktemp("model"), DEEPSEEK_R1))


def section(*stop: str) -> RolloutSection:
    return RolloutSection(
        prompts_per_step=2, group_size=2, max_new_tokens=6, temperature=0.7, top_p=0.9, top_k=5, stop=list(stop), rows=3
    )


# Numbers --------------------------------------------------------------------------------------------------------------


def test_the_numbers_never_change() -> None:
    frozen = [
        [0.16861218, 0.9127329, 0.6634034],
        [0.072888255, 0.48263645, 0.43275416],
    ]
    np.testing.assert_array_equal(uniforms(1, "train", 2, 3, 2, 3), np.array(frozen, np.float32))


def test_shape_type_and_range() -> None:
    numbers = uniforms(0, "train", 0, 0, 50, 400)
    assert (numbers.shape, numbers.dtype) == ((50, 400), np.float32)
    assert numbers.min() >= 0
    assert numbers.max() < 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), draw=st.integers(0, 10**9), data=st.data())
def test_numbers_do_not_depend_on_how_many_are_asked_for(seed: int, step: int, draw: int, data: st.DataObject) -> None:
    samples, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    whole = uniforms(seed, "train", step, draw, 6, 40)
    np.testing.assert_array_equal(uniforms(seed, "train", step, draw, samples, length), whole[:samples, :length])


def test_every_coordinate_counts() -> None:
    base = {"seed": 1, "stream": "train", "step": 2, "draw": 3}
    changes = [
        {},
        {"seed": 0},
        {"stream": "heldout"},
        {"step": 0},
        {"draw": 0},
        {"step": 3, "draw": 2},
        {"draw": 2**33},
    ]
    rows = np.concatenate([uniforms(**{**base, **change}, num_samples=3, length=8) for change in changes])
    assert len(np.unique(rows, axis=0)) == 3 * len(changes)


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    numbers = np.stack([uniforms(0, "train", step, 0, 8, 64) for step in range(60)]).astype(np.float64)
    counts = np.histogram(numbers, 16, (0, 1))[0]
    assert abs(counts / numbers.size * 16 - 1).max() < 0.06
    for axis in range(3):  # steps, samples, positions
        ahead, behind = np.moveaxis(numbers, axis, 0)[1:].ravel(), np.moveaxis(numbers, axis, 0)[:-1].ravel()
        assert abs(np.corrcoef(ahead, behind)[0, 1]) < 0.03


# The sampling rule ----------------------------------------------------------------------------------------------------


def test_rule_of_a_config(chat: Chat) -> None:
    rule = sampling_rule(section("</think>", "<｜User｜>"), chat)
    stops = sorted({*chat.stop_ids, chat.vocabulary["</think>"], chat.vocabulary["<｜User｜>"]})
    assert rule == Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=6, stop_ids=tuple(stops), rows=3)


@pytest.mark.parametrize("bad", ["two words", "", "<|im_end|>"])
def test_stop_string_that_is_not_one_token(bad: str, chat: Chat) -> None:
    with pytest.raises(ConfigError) as caught:
        sampling_rule(section("</think>", bad), chat)
    assert str(caught.value) == (
        f"rollout.stop = {[bad]!r}: not single tokens of this model. Name tokens as its tokenizer does."
    )


# Groups ---------------------------------------------------------------------------------------------------------------


class Echo:
    """The sampling part of a trainer: answers each prompt with tokens made of the numbers that it was given."""

    def __init__(self) -> None:
        self.asked: list[SamplingPrompt] = []

    def sample(self, prompts: Sequence[SamplingPrompt], sampling: Sampling) -> list[list[Response]]:
        self.asked += prompts
        return [[self._response(row) for row in prompt.uniforms] for prompt in prompts]

    @staticmethod
    def _response(row: np.ndarray) -> Response:
        return Response((row * 200).astype(np.int32), np.log(row + 0.1).astype(np.float32), "length")


def test_groups_carry_prompt_place_tokens_and_version(chat: Chat) -> None:
    trainer = Echo()
    sampler = RolloutSampler(trainer, chat, section(), seed=5)  # pyright: ignore: only `sample` is used
    draws = [Draw(place, Prompt(f"p{place}", "l", (Message("user", "a" * place),))) for place in (7, 3)]
    groups = sampler.groups(draws, "heldout", step=4, num_samples=3, policy_version=9)
    assert [(group.draw, group.prompt.id, len(group.rollouts)) for group in groups] == [(7, "p7", 3), (3, "p3", 3)]
    for draw, asked, group in zip(draws, trainer.asked, groups, strict=True):
        np.testing.assert_array_equal(asked.uniforms, uniforms(5, "heldout", 4, draw.place, 3, 6))
        np.testing.assert_array_equal(asked.token_ids, chat.encode_prompt(draw.prompt.messages))
        np.testing.assert_array_equal(group.prompt_token_ids, asked.token_ids)
        for row, rollout in zip(asked.uniforms, group.rollouts, strict=True):
            np.testing.assert_array_equal(rollout.token_ids, (row * 200).astype(np.int32))
            assert (rollout.policy_version, rollout.text) == (9, chat.decode(rollout.token_ids))


def test_a_response_in_an_opened_think_block_starts_inside_it(chat: Chat, tmp_path: Path) -> None:
    class Thinks(Echo):
        @staticmethod
        def _response(row: np.ndarray) -> Response:
            letters = [chat.vocabulary[token] for token in ("a", "</think>", "b")]
            return Response(np.array(letters, np.int32), np.zeros(3, np.float32), "length")

    draw = Draw(0, Prompt("p", "l", (Message("user", "hi"),)))
    closed = Chat(make_chat_folder(tmp_path, DEEPSEEK_R1._replace(template="{{ messages[0].content + '?' }}")))
    for model, reasoning in ((chat, "a"), (closed, None)):
        sampler = RolloutSampler(Thinks(), model, section(), seed=0)  # pyright: ignore: only `sample` is used
        ((rollout, _),) = (group.rollouts for group in sampler.groups([draw], "train", 0, 2, 0))
        assert rollout.reasoning_text == reasoning
