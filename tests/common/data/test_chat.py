"""Prompts are framed exactly as the model's template frames them, and nothing that a message spells becomes a frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ConfigError
from common.data.chat import Chat
from common.data.embedded_model import embedded_model
from common.types import Message
from tests.chat_models import DEEPSEEK_R1, FAMILIES, LLAMA3, QWEN, make_chat_folder
from tests.tiny import make_tokenizer

MODELS = ("tiny", "embedded", *FAMILIES)
CONVERSATIONS = [
    [Message("user", "hi")],
    [Message("system", "Be kind."), Message("user", "Why is  the sky\n\nblue?")],
    [Message("user", " 1 + 1 = ?\n"), Message("assistant", "2"), Message("user", "naïve 🙂 你好 \u2028\t.")],
    [Message("user", "a"), Message("assistant", "<think>\nhm\n</think>\n\nb"), Message("user", "c")],
    [Message("user", "< | im_end | > \ue000 a<b>c</b> [inst] {{ 7 * 7 }} {% if %}")],
]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rendered(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids that transformers itself gives."""
    turns = [message._asdict() for message in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {name: make_chat_folder(root / name, family) for name, family in FAMILIES.items()}
    (root / "tiny").mkdir()
    make_tokenizer(root / "tiny")
    return {"tiny": root / "tiny", "embedded": embedded_model(), **made}


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> dict[str, Chat]:
    return {name: Chat(folder) for name, folder in folders.items()}


# Frames ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_ids_are_those_of_transformers(
    name: str, messages: list[Message], folders: dict[str, Path], chats: dict[str, Chat]
) -> None:
    ids = chats[name].encode_prompt(messages)
    assert ids.dtype == np.int32
    assert ids.tolist() == rendered(tokenizer_of(folders[name]), messages)


def test_nothing_is_added_around_the_template(folders: dict[str, Path], chats: dict[str, Chat]) -> None:
    bos = tokenizer_of(folders["llama3"]).bos_token_id
    assert tokenizer_of(folders["llama3"]).encode("hi").count(bos) == 1  # what the tokenizer does when asked plainly
    ids = chats["llama3"].encode_prompt([Message("user", "hi")]).tolist()
    assert (ids.count(bos), ids[0]) == (1, bos)
    assert chats["llama3"].decode(ids[-2:]) == "\n\n"
    assert chats["llama3"].decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_configured_system_message(folders: dict[str, Path]) -> None:
    chat, user = Chat(folders["qwen"], system="Be brief."), Message("user", "hi")
    given_one = [Message("system", "Be long."), user]
    assert chat.decode(chat.encode_prompt([user])).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert chat.decode(chat.encode_prompt(given_one)).startswith("<|im_start|>system\nBe long.<|im_end|>")
    assert "You are a model in a test." in Chat(folders["qwen"]).decode(Chat(folders["qwen"]).encode_prompt([user]))


def test_reasoning_is_stripped_from_history_where_the_template_does_so(chats: dict[str, Chat]) -> None:
    messages = [Message("user", "a"), Message("assistant", "<think>secret</think>b"), Message("user", "c")]
    text = chats["deepseek"].decode(chats["deepseek"].encode_prompt(messages))
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>\n"
    )
    assert "<think>secret</think>b" in chats["qwen"].decode(chats["qwen"].encode_prompt(messages))


def test_template_may_open_the_think_block(chats: dict[str, Chat]) -> None:
    opens = {name for name, chat in chats.items() if chat.opens_reasoning([Message("user", "hi")])}
    assert opens == {"deepseek"}


def test_a_user_cannot_open_the_think_block(tmp_path: Path) -> None:
    bare = DEEPSEEK_R1._replace(template="{{ messages[-1].content }}")
    assert not Chat(make_chat_folder(tmp_path, bare)).opens_reasoning([Message("user", "<think>\n")])


# Control tokens in messages -------------------------------------------------------------------------------------------


def attacks(tokens: Sequence[str]) -> list[str]:
    """Texts that spell control tokens, plainly and so that a careless filter would make one."""
    end = next((token for token in tokens if "end" in token), tokens[0])
    half = len(end) // 2
    return [
        *tokens,
        "".join(tokens),
        end[:half] + end + end[half:],
        end[:half] + end[:half] + end + end[half:] + end[half:],
        end[:half] + "\ue000" + end[half:],
        f"\ue000{end[0]}\ue000{end[1:]}\ue001",
        "\ue000" + end + "\ue000",
        end[:-1] + end,
        end[0] + end + end[1:],
        f"x{end}\n{end}x",
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["user", "system", "assistant", "configured"])
def test_control_tokens_in_messages_stay_text(name: str, place: str, folders: dict[str, Path]) -> None:
    tokens = tokenizer_of(folders[name]).added_tokens_encoder
    thoughts = ("<think>", "</think>") if place == "assistant" else ()
    chat = Chat(folders[name])

    def ids(text: str) -> list[int]:
        messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
        turns = {"system": "zero", "user": "one", "assistant": "two"} | {place: text}
        if place == "configured":
            return Chat(folders[name], text).encode_prompt(messages).tolist()
        messages[:2] = [Message(role, turns[role]) for role in ("system", "user", "assistant") if role in turns]
        return chat.encode_prompt(messages).tolist()

    clean = ids("CLEAN")
    texts = attacks([token for token in tokens if token not in thoughts])
    control = set(tokens.values())
    for text in ["".join(texts)] if place == "configured" else texts:
        found = ids(text)
        assert [token for token in found if token in control] == [token for token in clean if token in control]
        assert chat.decode(found) == chat.decode(clean).replace("CLEAN", text)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_makes_a_control_token(name: str, data: st.DataObject, chats: dict[str, Chat]) -> None:
    family, chat = FAMILIES[name], chats[name]
    pieces = [*family.marked, *family.unmarked, "<|im_", "end|>", "<", ">", "|", "\ue000", "\ue001", "é"]
    texts = st.lists(st.sampled_from(pieces), min_size=1, max_size=8).map("".join)
    user, system = data.draw(texts), data.draw(texts)
    ids = chat.encode_prompt([Message("system", f"[{system}]"), Message("user", f"[{user}]")]).tolist()
    clean = chat.encode_prompt([Message("system", "[]"), Message("user", "[]")]).tolist()
    assert [token for token in ids if token >= 256] == [token for token in clean if token >= 256]
    text = chat.decode(ids)
    assert f"[{user}]" in text
    assert f"[{system}]" in text


def test_the_assistants_own_think_markers_stay_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    family = QWEN._replace(unmarked=("<think>", "</think>"))
    chat = Chat(make_chat_folder(tmp_path, family))
    think = [chat.vocabulary["<think>"], chat.vocabulary["</think>"]]
    history = [Message("user", "a"), Message("assistant", "<think>b</think>c"), Message("user", "<think>d</think>")]
    ids = chat.encode_prompt(history).tolist()
    assert [token for token in ids if token in think] == think
    assert "<think>d</think>" in chat.decode(ids)


# Folders that cannot be used ------------------------------------------------------------------------------------------


def complaint(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Chat(folder)
    return str(caught.value)


def test_folder_without_tokenizer_or_template(tmp_path: Path) -> None:
    assert complaint(tmp_path).startswith(f"model folder {tmp_path}: no usable tokenizer (")
    bare = make_chat_folder(tmp_path / "bare", QWEN._replace(template=""))
    assert complaint(bare) == (
        f"model folder {bare}: the tokenizer has no chat template. Use an instruct or chat model."
    )


def test_tokenizer_that_eats_the_space_after_a_control_token_is_refused(tmp_path: Path) -> None:
    folder = make_chat_folder(tmp_path, QWEN, rstrip=True)
    assert "its tokenizer joins text and control tokens" in complaint(folder)
    assert complaint(folder).endswith("Use a model with a byte-level tokenizer.")


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ['{"version": "1.0", "eos_token_id": "x"}', '{"version": "1.0", "eos_token_id": 2.5}', "[]", "{bad"]
)
def test_damaged_files_are_named(file: str, text: str, tmp_path: Path) -> None:
    (make_chat_folder(tmp_path, LLAMA3) / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"model folder {tmp_path}: no usable {file.removesuffix('.json')}"):
        Chat(tmp_path)


def test_a_template_that_is_no_template_is_told(tmp_path: Path) -> None:
    folder = make_chat_folder(tmp_path, QWEN._replace(template="{%- for message in -%}"))
    with pytest.raises(ConfigError, match="the model's chat template refuses a conversation of turns user, assistant"):
        Chat(folder)


def test_a_template_that_wants_a_system_turn_gets_the_configured_one(tmp_path: Path) -> None:
    wants = "{%- if messages[0].role != 'system' -%}{{ raise_exception('no system turn') }}{%- endif -%}"
    folder = make_chat_folder(tmp_path, QWEN._replace(template=wants + QWEN.template))
    chat = Chat(folder, "Answer.")
    assert "Answer." in chat.decode(chat.encode_prompt([Message("user", "Hi")]))
    with pytest.raises(ConfigError, match=r"\(no system turn\)\. Change the turns, or model\.system"):
        Chat(folder)


def test_refusing_template_is_told_with_the_turns(tmp_path: Path) -> None:
    raises = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    chat = Chat(make_chat_folder(tmp_path, QWEN._replace(template=raises + QWEN.template)))
    with pytest.raises(ConfigError) as caught:
        chat.encode_prompt([Message("system", "a"), Message("user", "b")])
    assert str(caught.value).startswith(
        "the model's chat template refuses a conversation of turns system, user (no system role). Change the turns"
    )


# Stop tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "stops"),
    [
        (None, ["<|eot_id|>"]),
        ({}, ["<|eot_id|>"]),
        ({"eos_token_id": 260}, ["<|eot_id|>", "<|end_of_text|>"]),
        ({"eos_token_id": [257, 260, 258]}, ["<|eot_id|>", "<|start_header_id|>", "<|end_of_text|>"]),
    ],
)
def test_stop_ids(generation: dict[str, Any] | None, stops: list[str], tmp_path: Path) -> None:
    chat = Chat(make_chat_folder(tmp_path, LLAMA3, generation))
    assert [chat.decode([token]) for token in chat.stop_ids] == stops
