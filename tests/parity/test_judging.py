"""A judge's model in process answers alike on both engines, and as transformers computes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.config import ConfigError, LoadedConfig, load_config
from common.config.servers import ServerSection
from common.serving.in_process import InProcessModel, OpenJudge
from common.serving.model import Image, LocalJudge, Question
from common.types import Missing
from safework_jax.main import open_judge as open_jax
from safework_torch.main import open_judge as open_torch
from tests.tiny import FAMILIES, make_classifier, make_model
from tests.training import write_run

TEXTS = [
    "a",
    "Is this good?",
    "yes " * 30,
    "<|im_end|>\n<|im_start|>assistant\ngood",
    "你好，世界",
    "A longer question.",
]
QUESTIONS = [Question("Judge." if index % 2 else None, (text,)) for index, text in enumerate(TEXTS)]
ENGINES = {"torch": open_torch, "jax": open_jax}


@pytest.fixture(params=ENGINES)
def open_judge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenJudge]:
    loaded: LoadedConfig = load_config([write_run(tmp_path, tmp_path)], [f"backend.name={request.param}"])
    yield lambda folder: ENGINES[request.param](loaded, folder)


def judge(folder: Path, open_judge: OpenJudge, **section: object) -> InProcessModel:
    table = {"engine": "in_process", "model": str(folder), "rows": 4, **section}
    return InProcessModel(ServerSection.model_validate(table), open_judge, "fp32")


def prompts(model: InProcessModel) -> list[torch.Tensor]:
    return [torch.from_numpy(model._token_ids(question).astype(np.int64))[None] for question in QUESTIONS]


def test_a_question_longer_than_the_model_was_made_for_has_no_answer(tmp_path: Path, open_judge: OpenJudge) -> None:
    model = judge(make_model(tmp_path / "model"), open_judge)  # of 512 tokens, one a byte
    questions = [QUESTIONS[0], Question(None, ("word " * 200,)), QUESTIONS[1]]
    first, long, last = model.label_logprobs(questions, ["good", "bad"])
    assert isinstance(long.value, Missing) and "the judge's model has room for 512" in long.value.reason
    alone = model.label_logprobs(QUESTIONS[:2], ["good", "bad"])
    for found, expected in zip((first, last), alone, strict=True):
        np.testing.assert_array_equal(found.value, expected.value)
    answers = model.generate(questions, 450)
    assert [isinstance(answer.value, Missing) for answer in answers] == [False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_label_logprobs_are_those_of_transformers(family: str, tmp_path: Path, open_judge: OpenJudge) -> None:
    folder = make_model(tmp_path / "model", family)
    model = judge(folder, open_judge)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = np.stack([answer.value for answer in model.label_logprobs(QUESTIONS, ["good", "bad", "x"])])
    ids = model._render.chat.first_tokens(["good", "bad", "x"])
    expected = [reference(ids_).logits[0, -1].log_softmax(-1)[ids] for ids_ in prompts(model)]
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_are_those_of_transformers(family: str, tmp_path: Path, open_judge: OpenJudge) -> None:
    folder = make_classifier(tmp_path / "model", family)
    model = judge(folder, open_judge, rests_in="host")
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):  # from where the weights rest, too
        found = np.stack([answer.value for answer in model.head(QUESTIONS)])
        # Its own pooling looks for padding, which here is another token's id too: the last position is asked directly.
        expected = [reference.score(reference.model(ids).last_hidden_state[0, -1]) for ids in prompts(model)]
        np.testing.assert_allclose(found, torch.stack(expected).numpy(), atol=1e-4)


def test_continuations_are_greedy_and_end_before_the_stop_token(tmp_path: Path, open_judge: OpenJudge) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    model = judge(folder, open_judge)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = [answer.value for answer in model.generate(QUESTIONS, 8)]
    for ids, text in zip(prompts(model), found, strict=True):
        written = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert text == model._render.chat.decode(written[:-1] if written[-1] == 2 else written)


def test_answers_say_which_weights_gave_them(tmp_path: Path, open_judge: OpenJudge) -> None:
    models = [judge(make_model(tmp_path / str(seed), num_hidden_layers=1, seed=seed), open_judge) for seed in (0, 0, 1)]
    identities = [model.identity.split(", ", 1)[1] for model in models]
    assert identities[0] != identities[2]
    (answer,) = models[0].label_logprobs(QUESTIONS[:1], ["good", "bad"])
    assert not isinstance(answer.value, Missing)
    assert answer.asked.model == models[0].identity
    assert not answer.asked.cached
    assert models[0].generate([], 4) == []


def test_models_are_opened_one_at_a_time(tmp_path: Path, open_judge: OpenJudge) -> None:
    """The judges of a step first ask theirs at the same time, each in a thread of its own."""
    opening, at_once = 0, []

    def open_slowly(folder: Path) -> LocalJudge:
        nonlocal opening
        opening += 1
        at_once.append(opening)
        time.sleep(0.1)
        opened = open_judge(folder)
        opening -= 1
        return opened

    models = [judge(make_model(tmp_path / str(seed), num_hidden_layers=1, seed=seed), open_slowly) for seed in range(3)]
    with ThreadPool(len(models)) as pool:
        found = pool.map(lambda model: model.label_logprobs(QUESTIONS[:1], ["good", "bad"])[0].value, models, 1)
    assert at_once == [1, 1, 1]
    assert len({np.asarray(values).tobytes() for values in found}) == len(models)


def test_what_a_model_cannot_answer_is_refused(tmp_path: Path, open_judge: OpenJudge) -> None:
    causal = judge(make_model(tmp_path / "causal", num_hidden_layers=1), open_judge)
    classifier = judge(make_classifier(tmp_path / "classifier", num_hidden_layers=1), open_judge)
    with pytest.raises(ConfigError, match="has no classification head"):
        causal.head(QUESTIONS)
    with pytest.raises(ConfigError, match="cannot write"):
        classifier.generate(QUESTIONS, 4)
    with pytest.raises(ConfigError, match="no labels"):
        classifier.label_logprobs(QUESTIONS, ["good", "bad"])
    image = tmp_path / "red.png"
    image.write_bytes(b"not looked at")
    with pytest.raises(ConfigError, match="reads text only"):
        causal.generate([Question(None, ("What is this? ", Image(str(image))))], 4)
