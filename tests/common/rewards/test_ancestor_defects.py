"""The ancestor's defects, one test each: what it got wrong (`rewards`, upstream) and what happens here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from common.config import ConfigError, load_config
from common.config.judging import JudgeSection, PromptSection, ReadOutSection
from common.config.servers import ServerSection
from common.rewards.judges.judge import Judge
from common.rewards.recipe import Recipe
from common.rewards.rules.format import ThinkFormat
from common.rewards.rules.instructions import Instructions
from common.rewards.scorer import Scorer
from common.rewards.threads import Verifying
from common.rewards.verifier import Verifier
from common.serving.http import Call, Replicas
from common.serving.in_process import unopened
from common.serving.served import ServedModel, ServerError
from common.serving.servers import Servers
from common.team import alone
from common.types import Message, Missing, Prompt, Sample, Score
from tests.common.rewards.samples import rollout, sample
from tests.common.serving.stand_in import Vllm, stand_in
from tests.common.serving.test_http import closed_port
from tests.tiny import make_tokenizer
from tests.training import write_run

VERDICTS = ReadOutSection(type="verdict", verdicts={"Safe": 1.0, "Unsafe": 0.0})


def section(user: str = "Q: {query} A: {response}", images: bool = False) -> JudgeSection:
    return JudgeSection(server="s", prompts={"en": PromptSection(user=user)}, read_out=VERDICTS, images=images)


@contextmanager
def judging(folder: Path, vllm: Vllm, judge: JudgeSection) -> Iterator[Judge]:
    """The judge behind a real HTTP connection."""
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder)
    with stand_in(vllm) as url:
        server = ServerSection(engine="vllm", model=str(folder), served_name="judge", urls=[url], deadline_s=5)
        with closing(ServedModel("s", server)) as model:
            yield Judge("safety", judge, model)


def spelled(vllm: Vllm, number: int = 0) -> str:
    """The question that a server was asked, from token ids: 256 bytes behind three control tokens."""
    from common.data.chat import Chat

    return Chat(Path(vllm.root)).decode(vllm.asked[number][1]["prompt"])


def test_1_format_looks_at_the_response_alone() -> None:
    # The system prompt holds an example of the format, which upstream's pattern found in every transcript.
    asked = sample("Just four.")
    assert "<think>" in asked.prompt.messages[0].content
    right = sample("<think>2 + 2</think>Four.")
    assert [score.value for score in ThinkFormat().score([asked, right])] == [0.0, 1.0]  # type: ignore[union-attr]


def test_2_judges_get_the_whole_question_and_the_answer_without_its_reasoning(tmp_path: Path) -> None:
    vllm = Vllm(root=str(tmp_path), text="Safe")
    question = "What does <|im_start|>user mean? And [INST]? Human: hi Assistant: ho"
    prompt = Prompt("p", "safety", (Message("system", "Think."), Message("user", question)))
    with judging(tmp_path, vllm, section()) as judge:
        judge.score([Sample(prompt, rollout("<think>secret thoughts</think>It opens a turn."))])
    text = spelled(vllm)
    assert f"Q: {question} A: It opens a turn." in text
    assert "secret thoughts" not in text


def test_3_judges_get_the_images(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"a picture")
    vllm = Vllm(root=str(tmp_path), text="Safe")
    prompt = Prompt("p", "safety", (Message("user", "What is <image>?"),), images=(str(picture),))
    with judging(tmp_path, vllm, section(images=True)) as judge:
        judge.score([Sample(prompt, rollout("A dog."))])
    kinds = [part["type"] for part in vllm.asked[0][1]["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "text"]


def test_4_judges_are_asked_through_their_chat_template_for_a_whole_verdict(tmp_path: Path) -> None:
    vllm = Vllm(root=str(tmp_path), text="Safe")
    with judging(tmp_path, vllm, section()) as judge:
        judge.score([sample("Four.")])
    text = spelled(vllm)
    assert text.startswith("<|im_start|>user\nQ: ")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert vllm.asked[0][1]["max_tokens"] == 16


def test_5_what_is_not_there_is_an_error_and_never_a_number(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    down = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ServerError, match="Start it"):
        ServedModel("s", ServerSection(engine="vllm", model=str(tmp_path), urls=[down], deadline_s=1))
    vllm = Vllm(root=str(tmp_path), text="I would rather not say.")
    with judging(tmp_path, vllm, section()) as judge:
        (found,) = judge.score([sample("Four.")])
    assert isinstance(found, Missing)
    assert found.unparsable


def recipe(folder: Path, *labels: str, **rewards: object) -> Recipe:
    loaded = load_config([write_run(folder, folder, rewards=rewards)])
    return Recipe(loaded.config.rewards, Servers(loaded, unopened), labels, loaded.origin)


def test_6_a_sample_goes_to_the_verifiers_of_its_label_alone(tmp_path: Path) -> None:
    made = recipe(tmp_path, "general_rule", "instruction_rule")
    scorer = Scorer(made, load_config([write_run(tmp_path, tmp_path)]).config.rewards, alone())
    samples = [
        Sample(Prompt("a", "general_rule", (Message("user", "2 + 2?"),), "4"), rollout("4")),
        Sample(
            Prompt("b", "instruction_rule", (Message("user", "x"),), [["Length", "Words", "at most 2 words"]]),
            rollout("x"),
        ),
    ]
    assert [sorted(result) for result in scorer.results(samples)] == [["answer"], ["instructions"]]


class NeverReturns(Verifier):
    name = "never"

    def score(self, samples: object) -> list[Score | Missing]:
        while True:
            time.sleep(1)


def test_8_a_grader_that_never_returns_ends_at_its_deadline() -> None:
    started = time.monotonic()
    (found,) = Verifying({"never": NeverReturns()}, 0.3).results({"never": [sample("x")]})["never"]
    assert isinstance(found, Missing)
    assert time.monotonic() - started < 10


def test_9_a_list_of_one_constraint_is_a_list_of_one() -> None:
    constraint = ["Length", "Words", "at most 2 words"]
    scores = Instructions().score([sample("two words", [constraint]), sample("these are three", [constraint])])
    assert [score.value for score in scores] == [1.0, 0.0]  # type: ignore[union-attr]


def test_10_questions_travel_side_by_side() -> None:
    in_flight, most = 0, 0

    async def slow(request: web.Request) -> web.Response:
        import asyncio

        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.3)
        in_flight -= 1
        return web.json_response({"value": 1})

    with stand_in(slow) as url:
        server = ServerSection(engine="vllm", model="m", urls=[url], concurrency=16)
        with closing(Replicas("s", server, {})) as replicas:
            replies = replicas.call_all([Call("/x", {}, lambda reply: reply["value"]) for _ in range(16)])
    assert [reply.result for reply in replies] == [1] * 16
    assert most == 16


def test_11_a_label_that_a_judge_knows_and_the_recipe_does_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no terms for the data's label 'safety'"):
        recipe(tmp_path, "safety")
