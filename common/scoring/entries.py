"""The file that is scored -> entries: prompts with the responses to them, as they were sampled or as somebody has them.

Records of data files (`common/data/records.py`) have a `response` beside the prompt; in `conversations` without one the
last gpt turn is it. A record may say whether the prompt had `opened` the think block, hold the response's `token_ids`,
and say what a verifier should find: `expected: {verifier: verdict or number}`, or `verdict` where its label has one
judge. Records of a run are those of its rollouts.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError, LoadedConfig
from common.config.sentences import sentence
from common.data.chat import THINK_CLOSE, THINK_OPEN, Chat, transcript
from common.data.model_folder import tokenizer_folder
from common.data.records import ROLES, BadRecord, check_markers, given_label, parse_line, parse_prompt, parse_turns
from common.scoring.expected import Expected, expected_values
from common.types import Prompt, Rollout, Sample, Score, Span, Transcript

ROLLOUTS = "rollouts.jsonl"


@dataclass(frozen=True)
class Entry:
    """One record: its id, a prompt and a response, what verifiers should find, and what they found in a run."""

    id: str
    sample: Sample
    expected: Mapping[str, Expected]
    recorded: Mapping[str, Score]


class Reader:
    """Reads files under a config. `label` is that of records that have none."""

    def __init__(self, loaded: LoadedConfig, label: str | None) -> None:
        self._loaded, self._label = loaded, label
        self._opened_chat: Chat | None = None

    def read(self, path: Path) -> list[Entry]:
        """The entries of a file, or of a run's folder, in order; bad records as `data.on_bad_record` has it.

        Raises ConfigError, naming file, line and reason.
        """
        file = path / ROLLOUTS if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise ConfigError(f"{path}: is not a run folder (no {ROLLOUTS}). Give the run.dir of a run, or a file.")
        entries, bad = [], []
        for number, line in _lines(file):
            try:
                entries.append(self._entry(parse_line(line), f"{file.stem}-{number}"))
            except BadRecord as error:
                bad.append(f"{file}:{number}: {error}")
                if self._loaded.config.data.on_bad_record == "error":
                    raise ConfigError(f"{bad[0]} Mend the record, or set data.on_bad_record to skip.") from None
        if bad:
            print(f"{file}: {len(bad)} bad records skipped, the first: {bad[0]}", file=sys.stderr)
        if not entries:
            raise ConfigError(f"{file}: no usable record ({len(bad)} bad). Give a file with prompts and responses.")
        return entries

    def _entry(self, record: dict[str, Any], default_id: str) -> Entry:
        if "messages" in record:
            return self._of_run(record)
        record = _with_response(record)
        if given_label(record) is None:
            if self._label is None:
                raise BadRecord("has no 'label', at top level or in extra_info. Add it, or give one by --label LABEL.")
            record["label"] = self._label
        prompt = parse_prompt(record, default_id, self._loaded.config.data.reference_key)
        sample = Sample(prompt, self._transcript(record, prompt))
        return Entry(prompt.id, sample, self._expected(record, prompt.label), {})

    def _expected(self, record: dict[str, Any], label: str) -> Mapping[str, Expected]:
        rewards = self._loaded.config.rewards
        return expected_values(record, label, rewards) if label in rewards.recipe else {}  # which is refused later

    def _transcript(self, record: dict[str, Any], prompt: Prompt) -> Transcript:
        text, token_ids = record["response"], record.get("token_ids")
        if token_ids is not None:
            token_ids = _token_ids(token_ids)
        return transcript(text, self._is_opened(record, prompt), token_ids)

    def _is_opened(self, record: dict[str, Any], prompt: Prompt) -> bool:
        """Whether a response begins inside a think block: as the record says, else as the policy's template has it.

        Where that opens one, a response without any marker may be all reasoning or all answer, so it is not guessed.
        """
        opened = record.get("opened")
        if opened is not None and not isinstance(opened, bool):
            raise BadRecord("'opened' must be true or false.")
        if opened is not None or record["response"].lstrip().startswith(THINK_OPEN):
            return bool(opened)
        opened = self._chat.opens_reasoning(prompt.messages)
        if opened and THINK_CLOSE not in record["response"]:
            raise BadRecord(
                'the chat template of model.path opens a think block, and the response closes none. Add "opened": '
                "true if it was cut off while reasoning, false if all of it is the answer."
            )
        return opened

    @property
    def _chat(self) -> Chat:
        """The policy's chat template, read when a record first needs it."""
        if self._opened_chat is None:
            model = self._loaded.config.model
            try:
                self._opened_chat = Chat(tokenizer_folder(model.path), model.system)
            except ConfigError as error:
                origin = self._loaded.origin("model.path")
                raise ConfigError(sentence("model.path", model.path, origin, str(error))) from None
        return self._opened_chat

    def _of_run(self, record: dict[str, Any]) -> Entry:
        try:
            prompt = Prompt(
                id=str(record["prompt_id"]),
                label=str(record["label"]),
                messages=tuple(parse_turns(record["messages"], "messages", "role", "content")),
                reference=record["reference"],
                images=tuple(map(str, record["images"])),
            )
            if prompt.images:
                check_markers(prompt.images, prompt.messages)
            rollout, recorded = _rollout(record), _recorded(record)
            name = f"{prompt.id}/{record['step']}/{record['draw']}/{record['sample']}"
        except BadRecord:
            raise
        except KeyError as error:
            raise BadRecord(
                f"has 'messages', as the records of a run, but no {error}. Give the {ROLLOUTS} of a run that this "
                "version trained, or write 'prompt' and 'response'."
            ) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadRecord(f"is no record of a run ({error}). Put the file back as it was.") from None
        return Entry(name, Sample(prompt, rollout), self._expected(record, prompt.label), recorded)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        with file.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except OSError as error:
        raise ConfigError(
            f"{file.absolute()}: cannot be read ({error.strerror or error}). Correct the path of the file to score."
        ) from None


def _with_response(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its response in a field of its own, so that no answer under test is taken for the reference."""
    turns = record.get("conversations")
    if "response" not in record and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        last = turns[-1]
        if ROLES.get(str(last.get("from"))) == "assistant":
            record = {**record, "conversations": turns[:-1], "response": last.get("value")}
    if not isinstance(record.get("response"), str):
        raise BadRecord("has no 'response' (a string), nor conversations that end with a gpt turn. Add what is scored.")
    return dict(record)


def _token_ids(given: Any) -> np.ndarray:
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < 2**31 for token in given):
        raise BadRecord("'token_ids' must be a list of token ids.")
    return np.array(given, np.int32)


def _rollout(record: dict[str, Any]) -> Rollout:
    """The response of a run's record as it was sampled."""
    token_ids, spans = _token_ids(record["token_ids"]), record["spans"]
    return Rollout(
        token_ids=token_ids,
        sampled=np.ones(len(token_ids), bool),  # all environments have one turn: the policy wrote every token
        logprobs=np.array(record["logprobs"], np.float32),
        text=_text(record["response"]),
        reasoning_text=None if record["reasoning"] is None else _text(record["reasoning"]),
        answer_text=_text(record["answer"]),
        reasoning=None if spans["reasoning"] is None else Span(*spans["reasoning"]),
        answer=Span(*spans["answer"]),
        finish_reason=record["finish_reason"],
        policy_version=int(record["policy_version"]),
    )


def _recorded(record: dict[str, Any]) -> dict[str, Score]:
    """The scores that the run gave."""
    verdicts, evidence = record["verdicts"], record["evidence"]
    return {
        name: Score(float(value), _text(evidence[name]), verdicts.get(name)) for name, value in record["scores"].items()
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
