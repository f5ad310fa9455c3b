"""A response's text, its reasoning and answer, and their token offsets, also where tokens cut characters in two."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.chat import Chat
from common.data.embedded_model import embedded_model
from common.types import FinishReason, Rollout, Span
from tests.chat_models import DEEPSEEK_R1, QWEN, make_chat_folder

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]) | st.sampled_from("é你🙂\n <>\ufffd"), max_size=12
)


@pytest.fixture(scope="module")
def byte_chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """A tokenizer with one token a byte and no think tokens: each character beyond ASCII is cut."""
    return Chat(make_chat_folder(tmp_path_factory.mktemp("bytes"), QWEN))


@pytest.fixture(scope="module")
def think_chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """The same with <think> and </think> as tokens."""
    return Chat(make_chat_folder(tmp_path_factory.mktemp("think"), DEEPSEEK_R1))


@pytest.fixture(scope="module")
def embedded_chat() -> Chat:
    """A real vocabulary, whose tokens cross the borders of the think block."""
    return Chat(embedded_model())


def tokens(chat: Chat, text: str) -> np.ndarray:
    """A response of this text, control tokens as tokens."""
    return np.array(chat._tokenizer.encode(text, add_special_tokens=False), np.int32)


def respond(chat: Chat, ids: np.ndarray, finish: FinishReason = "length", opened: bool = False) -> Rollout:
    return chat.rollout(ids, np.full(len(ids), -0.5, np.float32), finish, policy_version=3, opened=opened)


def span_text(chat: Chat, ids: np.ndarray, span: Span) -> str:
    return chat.decode(ids[span.start : span.end])


def test_everything_of_a_response(byte_chat: Chat) -> None:
    ids = tokens(byte_chat, "<think>hm</think>\nyes<|im_end|>")
    rollout = respond(byte_chat, ids, "stop")
    np.testing.assert_array_equal(rollout.token_ids, ids)
    assert (rollout.text, rollout.reasoning_text, rollout.answer_text) == ("<think>hm</think>\nyes", "hm", "\nyes")
    assert (rollout.reasoning, rollout.answer) == (Span(7, 9), Span(17, 21))
    assert (rollout.finish_reason, rollout.policy_version) == ("stop", 3)
    assert rollout.sampled.tolist() == [True] * 22
    assert rollout.logprobs.tolist() == [-0.5] * 22


# Think blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("just text", False, None, "just text"),
        ("", False, None, ""),
        ("<think>a</think>b", False, "a", "b"),
        ("\n <think>a</think>b", False, "a", "b"),
        ("<think></think>b", False, "", "b"),
        ("<think>a</think>", False, "a", ""),
        ("<think>never closed", False, None, ""),
        ("closed only</think>b", False, None, "closed only</think>b"),
        ("late <think>a</think>b", False, None, "late <think>a</think>b"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think>a<think>b</think>c", False, "a<think>b", "c"),
        ("a</think>b", True, "a", "b"),
        ("</think>b", True, "", "b"),
        ("<think>a</think>b", True, "<think>a", "b"),
        ("never closed", True, None, ""),
        ("", True, None, ""),
    ],
)
def test_reasoning_and_answer(
    text: str, opened: bool, reasoning: str | None, answer: str, byte_chat: Chat, think_chat: Chat
) -> None:
    for chat in (byte_chat, think_chat):
        ids = tokens(chat, text)
        rollout = respond(chat, ids, opened=opened)
        assert (rollout.text, rollout.reasoning_text, rollout.answer_text) == (text, reasoning, answer)
        assert (rollout.reasoning is None) == (reasoning is None)
        assert span_text(chat, ids, rollout.answer) == answer
        if rollout.reasoning is not None:
            assert span_text(chat, ids, rollout.reasoning) == reasoning


@settings(max_examples=200, deadline=None)
@given(lead=st.sampled_from(["", "\n", " \u2003"]), reasoning=TEXTS, answer=TEXTS, opened=st.booleans())
def test_spans_decode_to_the_texts(
    lead: str, reasoning: str, answer: str, opened: bool, byte_chat: Chat, think_chat: Chat
) -> None:
    text = f"{reasoning}</think>{answer}" if opened else f"{lead}<think>{reasoning}</think>{answer}"
    for chat in (byte_chat, think_chat):
        ids = tokens(chat, text)
        rollout = respond(chat, ids, opened=opened)
        assert (rollout.reasoning_text, rollout.answer_text) == (reasoning, answer)
        assert rollout.reasoning is not None
        assert span_text(chat, ids, rollout.reasoning) == reasoning
        assert span_text(chat, ids, rollout.answer) == answer


@settings(max_examples=200, deadline=None)
@given(reasoning=TEXTS, answer=TEXTS)
def test_spans_hold_the_texts_where_tokens_cross_the_border(reasoning: str, answer: str, embedded_chat: Chat) -> None:
    ids = tokens(embedded_chat, f"<think>{reasoning}</think>{answer}")
    rollout = respond(embedded_chat, ids)
    assert rollout.reasoning is not None
    assert rollout.reasoning_text is not None
    assert rollout.reasoning_text in span_text(embedded_chat, ids, rollout.reasoning)
    assert rollout.answer_text in span_text(embedded_chat, ids, rollout.answer)
    assert rollout.reasoning.end <= rollout.answer.start
    assert rollout.answer.end == len(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=24), opened=st.booleans())
def test_any_bytes_give_spans_within_the_response(ids: list[int], opened: bool, byte_chat: Chat) -> None:
    response = np.array(ids, np.int32)
    rollout = respond(byte_chat, response, opened=opened)
    assert rollout.text == byte_chat.decode(ids)
    for span in (rollout.reasoning, rollout.answer):
        assert span is None or 0 <= span.start <= span.end <= len(ids)


def test_a_character_that_was_cut_off_belongs_to_the_answer(byte_chat: Chat) -> None:
    ids = tokens(byte_chat, "<think>é</think>你")[:-1]
    rollout = respond(byte_chat, ids)
    assert (rollout.reasoning_text, rollout.answer_text) == ("é", "\ufffd")
    assert rollout.reasoning is not None
    assert span_text(byte_chat, ids, rollout.reasoning) == "é"
    assert rollout.answer == Span(len(ids) - 2, len(ids))


# Stop tokens ----------------------------------------------------------------------------------------------------------


def test_stop_token_is_sampled_and_trained_but_no_text(byte_chat: Chat) -> None:
    ids = tokens(byte_chat, "yes<|im_end|>")
    rollout = respond(byte_chat, ids, "stop")
    assert (rollout.text, rollout.answer_text, rollout.answer) == ("yes", "yes", Span(0, 3))
    assert len(rollout.token_ids) == len(rollout.sampled) == len(rollout.logprobs) == 4
    assert rollout.sampled.all()


def test_stop_string_of_the_config_is_no_text_either(byte_chat: Chat) -> None:
    rollout = respond(byte_chat, tokens(byte_chat, "one\n"), "stop")
    assert (rollout.text, rollout.answer) == ("one", Span(0, 3))


def test_nothing_but_a_stop_token(byte_chat: Chat) -> None:
    rollout = respond(byte_chat, np.array(byte_chat.stop_ids[:1], np.int32), "stop")
    assert (rollout.text, rollout.answer_text, rollout.answer, rollout.reasoning) == ("", "", Span(0, 0), None)


def test_truncated_response_has_no_stop_token_to_lose(byte_chat: Chat) -> None:
    rollout = respond(byte_chat, tokens(byte_chat, "yes"), "length")
    assert (rollout.text, rollout.answer, len(rollout.token_ids)) == ("yes", Span(0, 3), 3)


def test_control_tokens_inside_a_response_are_seen(byte_chat: Chat) -> None:
    text = "a<|im_start|>user\nb"
    assert respond(byte_chat, tokens(byte_chat, text)).text == text


def test_long_response_is_read_quickly(embedded_chat: Chat) -> None:
    ids = tokens(embedded_chat, "<think>" + "a word 你 " * 4000 + "</think>" + "an answer " * 2000)
    assert len(ids) > 16_000
    started = time.perf_counter()
    rollout = respond(embedded_chat, ids)
    assert rollout.answer_text == "an answer " * 2000
    assert time.perf_counter() - started < 3
