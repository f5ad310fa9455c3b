"""Scoring with rules, in one process: what is written, resumed, refused and missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from common.disk import NotSaved
from common.scoring.score import CHUNK
from common.scoring.scores_file import Line, Name, ScoresFile
from common.types import Missing
from tests.common.serving.stand_in import Vllm, stand_in
from tests.full_disk import limited_files, small_disk
from tests.numpy_run import train
from tests.runs import lowercase_run, read_lines
from tests.scoring import GOOD, answered, score_here, write_answers
from tests.tiny import make_model

OWN = "tests.common.rewards.own_verifiers"


def rules_run(folder: Path, **verifiers: dict[str, Any]) -> Path:
    """A run file whose labels are its verifiers: `shouts`, `length`, and `known`, whose scores stand in known.json."""
    (folder / "known.json").write_text(json.dumps({"1.": 0.25, "2.": 0.75}))
    all_of_them = {
        "shouts": {"rule": f"{OWN}:shouts"},
        "length": {"rule": "overlong", "options": {"max_length": 6, "buffer": 4}},
        "known": {"rule": f"{OWN}:from_file", "options": {"file": str(folder / "known.json")}},
        "instructions": {"rule": "instructions"},
        **verifiers,
    }
    recipe = {name: {name: 1.0} for name in all_of_them} | {"two": {"known": 2.0, "shouts": 1.0}}
    return lowercase_run(folder, rewards={"verifiers": all_of_them, "recipe": recipe})


def answers(folder: Path, label: str = "shouts", count: int = 5, **fields: Any) -> Path:
    return write_answers(
        folder / "answers.jsonl", [answered(number, label, **fields) for number in range(1, count + 1)]
    )


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.summary.json").read_text())


def test_each_record_has_a_line_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [answered(1, "two"), answered(2, "known"), answered(3, "shouts", response="NO")]
    file = write_answers(tmp_path / "answers.jsonl", records)
    assert score_here(rules_run(tmp_path), file, tmp_path / "scores.jsonl") == 0
    lines = read_lines(tmp_path / "scores.jsonl")
    assert [(line["id"], line["label"], line["total"], line["scores"]) for line in lines] == [
        ("r1", "two", 0.5, {"known": 0.25, "shouts": 0.0}),
        ("r2", "known", 0.75, {"known": 0.75}),
        ("r3", "shouts", 1.0, {"shouts": 1.0}),
    ]
    assert lines[0]["evidence"] == {"known": "0.25", "shouts": "0"}
    assert [line["missing"] for line in lines] == [{}, {}, {}]
    assert summary(tmp_path)["records"] == 3
    out = capsys.readouterr().out
    assert "3/3  " in out
    assert " records/s, 0 missing, left 0.0 min" in out


def test_a_label_for_all(tmp_path: Path) -> None:
    file = write_answers(tmp_path / "answers.jsonl", [{"prompt": "?", "response": "NO"}])
    assert score_here(rules_run(tmp_path), file, tmp_path / "scores.jsonl", label="shouts") == 0
    assert read_lines(tmp_path / "scores.jsonl")[0]["scores"] == {"shouts": 1.0}


def test_what_is_there_is_not_scored_again(tmp_path: Path) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path, "known", 2), tmp_path / "scores.jsonl"
    assert score_here(run_file, file, out) == 0
    before = out.read_bytes()
    (tmp_path / "known.json").write_text("{}")
    assert score_here(run_file, file, out) == 0
    assert out.read_bytes() == before
    # More records are no others.
    (tmp_path / "known.json").write_text(json.dumps({"4.": 0.5}))
    with file.open("a") as more:
        more.write(json.dumps(answered(4, "known")) + "\n")
    assert score_here(run_file, file, out) == 0
    assert out.read_bytes().startswith(before)
    assert [line["total"] for line in read_lines(out)] == [0.25, 0.75, 0.5]


def test_equal_records_have_a_line_each(tmp_path: Path) -> None:
    run_file, out = rules_run(tmp_path), tmp_path / "scores.jsonl"
    twice = [answered(1, "known"), answered(1, "known"), answered(2, "known")]
    file = write_answers(tmp_path / "answers.jsonl", twice)
    assert score_here(run_file, file, out) == 0
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    assert score_here(run_file, file, out) == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_torn_line_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path, count=4), tmp_path / "scores.jsonl"
    assert score_here(run_file, file, out) == 0
    whole = out.read_bytes()
    last = len(whole) - whole[:-1].rfind(b"\n") - 1
    for torn in (2, last // 2, last - 1, last - 4):
        out.write_bytes(whole[:-torn])
        capsys.readouterr()
        assert score_here(run_file, file, out) == 0
        assert out.read_bytes() == whole
        assert f"{out}: 3 of 4 records are scored already" in capsys.readouterr().out


def test_missing_scores_are_counted_said_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path, "two", 5), tmp_path / "scores.jsonl"
    assert score_here(run_file, file, out) == 1
    assert (
        'error: verifier "known": 3 of 5 scores missing, the first because the user\'s code gave no score. Limit is 0 '
        "in all (rewards.max_missing). The same command asks for them again; or raise the limit."
    ) in capsys.readouterr().err
    lines = read_lines(out)
    assert [line["total"] for line in lines] == [0.5, 1.5, None, None, None]
    assert lines[2]["missing"] == {"known": "the user's code gave no score"}
    assert lines[2]["scores"] == {"shouts": 0.0}
    assert summary(tmp_path)["missing"] == 3
    assert score_here(run_file, file, out, "rewards.max_missing=3") == 0

    (tmp_path / "known.json").write_text(json.dumps({"是3。": 0.0, "4.": 0.0, "5.": 0.0}))
    assert score_here(run_file, file, out) == 0
    assert [line["total"] for line in read_lines(out)] == [0.5, 1.5, 0.0, 0.0, 0.0]
    assert [line["id"] for line in read_lines(out)] == ["r1", "r2", "r3", "r4", "r5"]
    assert summary(tmp_path)["missing"] == 0


def test_a_rule_that_counts_tokens_has_no_score_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [answered(1, "length"), answered(2, "length", token_ids=[5, 6, 7, 8])]
    file = write_answers(tmp_path / "answers.jsonl", records)
    assert score_here(rules_run(tmp_path), file, tmp_path / "scores.jsonl") == 1
    assert "overlong counts tokens, and the record has no token_ids" in capsys.readouterr().err
    assert [line["scores"] for line in read_lines(tmp_path / "scores.jsonl")] == [{}, {"length": -0.5}]


# name: (what stands in the file, what the error says of it)
FOREIGN = {
    "the data itself": (lambda lines, data: data, "its line 1 is damaged, or none that this command writes"),
    "one line without an end": (lambda lines, data: b'{"id": "mine"}', "its line 1 is none that this command writes"),
    "damaged": (lambda lines, data: lines[0] + lines[1][:30] + b"\n" + lines[2], "its line 2 is damaged, or none"),
    "a blank line": (lambda lines, data: lines[0] + b"\n" + lines[1], "its line 2 is damaged, or none"),
    "twice": (lambda lines, data: lines[0] + lines[1] + lines[0], "its line 3 ('r1') comes of other records"),
    "not text": (lambda lines, data: bytes(range(256)), "its line 1 is damaged"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_refused_and_left_alone(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path, count=3), tmp_path / "scores.jsonl"
    assert score_here(run_file, file, out) == 0
    make, said = FOREIGN[name]
    content = make(out.read_bytes().splitlines(keepends=True), file.read_bytes())
    out.write_bytes(content)
    capsys.readouterr()
    assert score_here(run_file, file, out) == 1
    assert f"error: --out {out}: {said}" in capsys.readouterr().err
    assert out.read_bytes() == content


# name: what changes between two commands with the same --out
CHANGES = {
    "options": ["rewards.verifiers.shouts.options={limit: 2}"],
    "weights": ["rewards.recipe.shouts={shouts: 0.5}"],
    "gates": ["rewards.gates={shouts: [shouts]}"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_scores_by_other_verifiers_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path, token_ids=[1]), tmp_path / "scores.jsonl"
    assert score_here(run_file, file, out) == 0
    before = out.read_bytes()
    assert score_here(run_file, file, out, *CHANGES[name]) == 1
    assert f"--out {out}: its line 1 ('r1') comes of other records or verifiers" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert score_here(run_file, file, out, "rewards.deadline_s=5.0", "run.steps=9") == 0


def test_scores_of_other_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, out = rules_run(tmp_path), tmp_path / "scores.jsonl"
    assert score_here(run_file, answers(tmp_path, reference="a"), out) == 0
    for changes in ({"reference": "b"}, {"reference": "a", "prompt": "?"}, {"reference": "a", "response": "!"}):
        assert score_here(run_file, answers(tmp_path, **changes), out) == 1
        assert "comes of other records or verifiers" in capsys.readouterr().err
    assert score_here(run_file, answers(tmp_path, reference="a", expected={"shouts": 1.0}), out) == 0


def test_a_label_without_terms_and_a_reference_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, out = rules_run(tmp_path), tmp_path / "scores.jsonl"
    assert score_here(run_file, answers(tmp_path, "shout"), out) == 1
    assert "has no terms for the data's label 'shout'" in capsys.readouterr().err
    file = answers(tmp_path, "instructions", reference=3)
    assert score_here(run_file, file, out) == 1
    assert f"error: {file}: prompt 'r1' (label 'instructions'), verifier 'instructions': " in capsys.readouterr().err
    assert not out.exists()


def test_two_commands_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, file, out = rules_run(tmp_path), answers(tmp_path), tmp_path / "scores.jsonl"
    other = ScoresFile(out)
    try:
        assert score_here(run_file, file, out) == 1
    finally:
        other.close()
    assert f"--out {out}: another process writes its scores there" in capsys.readouterr().err
    assert score_here(run_file, file, out) == 0


def test_a_file_that_another_command_exchanged_meanwhile_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that resumes puts a new file in place of the old one and lets go of that."""
    run_file, file, out = rules_run(tmp_path), answers(tmp_path), tmp_path / "scores.jsonl"

    def late(opened: int, how: int) -> None:
        (tmp_path / "new").write_text("")
        (tmp_path / "new").rename(out)

    monkeypatch.setattr("common.scoring.scores_file.fcntl.flock", late)
    assert score_here(run_file, file, out) == 1
    assert f"--out {out}: another process writes its scores there" in capsys.readouterr().err
    assert out.read_text() == ""


def test_each_file_of_scores_has_a_summary_of_its_own(tmp_path: Path) -> None:
    run_file, file = rules_run(tmp_path), answers(tmp_path)
    for name in ("a.first", "a.second", "b.jsonl"):
        assert score_here(run_file, file, tmp_path / name) == 0
    found = sorted(path.name for path in tmp_path.glob("*.summary.json"))
    assert found == ["a.first.summary.json", "a.second.summary.json", "b.summary.json"]


def test_a_run_is_scored_to_the_same_scores(tmp_path: Path) -> None:
    run_file = lowercase_run(tmp_path, run={"steps": 3})
    assert train(run_file).status == 0
    out = tmp_path / "scores.jsonl"
    assert score_here(run_file, tmp_path / "run", out) == 0
    records, lines = read_lines(tmp_path / "run" / "rollouts.jsonl"), read_lines(out)
    assert [line["scores"] for line in lines] == [record["scores"] for record in records]
    assert [line["total"] for line in lines] == [record["reward"] for record in records]
    assert [line["evidence"] for line in lines] == [record["evidence"] for record in records]
    [change] = summary(tmp_path)["changes"]
    assert (change["count"], change["mean_difference"], change["largest_difference"]) == (48, 0.0, 0.0)
    assert change["equal_verdicts"] is None


# Full disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "limit"])
def full(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that holds one MiB."""
    kind = small_disk if request.param == "disk" else limited_files
    with kind(tmp_path / "full") as folder:
        yield folder


def test_a_full_disk_keeps_whole_chunks(tmp_path: Path, full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, out = rules_run(tmp_path), full / "scores.jsonl"
    records = [answered(number, "shouts", id=f"{number}-{'x' * 500}") for number in range(6 * CHUNK)]
    file = write_answers(tmp_path / "answers.jsonl", records)
    assert score_here(run_file, file, out) == 1
    kept = read_lines(out)
    assert 0 < len(kept) < len(records)
    assert len(kept) % CHUNK == 0
    assert out.read_bytes().endswith(b"\n")
    said = capsys.readouterr().err
    assert f"error: {out}: could not be written (" in said
    assert f"; the {len(kept)} records scored before are in it. Make room on the disk and start the same" in said

    if not full.is_mount():  # the limit holds everywhere
        return
    elsewhere = tmp_path / "scores.jsonl"
    elsewhere.write_bytes(out.read_bytes())
    assert score_here(run_file, file, elsewhere) == 0
    assert [line["id"] for line in read_lines(elsewhere)] == [record["id"] for record in records]


def test_a_full_disk_while_making_room_leaves_the_file(tmp_path: Path, full: Path) -> None:
    names = [Name("key", f"{number:01000}") for number in range(700)]
    lines = [Line(name, "l", None, {"v": Missing("down")} if name == names[0] else {}) for name in names]
    scores = ScoresFile(full / "scores.jsonl")
    scores.append(lines)
    before = (full / "scores.jsonl").read_bytes()
    try:
        (full / "ballast").write_bytes(bytes(200_000))
        if full.is_mount():
            with pytest.raises(NotSaved, match=r"could not be written .*; the file is as it was\. Make room"):
                scores.resume(names)
            assert (full / "scores.jsonl").read_bytes() == before
        else:  # a limit of each file's size leaves room for another
            assert len(scores.resume(names)) == 699
        assert not list(full.glob("*.partial"))
    finally:
        scores.close()


def test_scores_by_code_that_was_edited_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "edited_rule.py"
    code.write_text("def half(sample):\n    return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_file, out = rules_run(tmp_path, shouts={"rule": "edited_rule:half"}), tmp_path / "scores.jsonl"
    assert score_here(run_file, answers(tmp_path), out) == 0
    assert score_here(run_file, answers(tmp_path), out) == 0
    code.write_text("def half(sample):\n    return 0.25\n")
    assert score_here(run_file, answers(tmp_path), out) == 1
    assert "comes of other records or verifiers" in capsys.readouterr().err


# Judges over HTTP -----------------------------------------------------------------------------------------------------


def served_run(folder: Path, url: str) -> Path:
    """A run file whose label `kind` is judged by a served model."""
    model = make_model(folder / "judge", num_hidden_layers=1)
    judge = {"server": "s", "prompts": GOOD, "read_out": {"type": "verdict", "verdicts": {"good": 1.0, "bad": 0.0}}}
    return lowercase_run(
        folder,
        servers={
            "s": {"engine": "vllm", "model": str(model), "served_name": "judge", "urls": [url], "deadline_s": 2.0}
        },
        rewards={
            "verifiers": {"kind": {"judge": "kind"}},
            "judges": {"kind": judge},
            "recipe": {"kind": {"kind": 1.0}},
        },
    )


def test_unparsable_answers_and_those_from_the_cache_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEWORK_CACHE", str(tmp_path / "cache"))
    file, vllm = answers(tmp_path, "kind", 4, verdict="good"), Vllm(text="hm")
    with stand_in(vllm) as url:
        run_file = served_run(tmp_path, url)
        assert score_here(run_file, file, tmp_path / "scores.jsonl", "rewards.cache=false") == 1
        [agreement] = summary(tmp_path)["agreements"]
        assert agreement["confusion"] == {"good": {"good": 0, "bad": 0, "(none)": 4}}
        assert (agreement["accuracy"], agreement["macro_f1"]) == (0.0, 0.0)
        assert summary(tmp_path)["spreads"][0]["unparsable"] == 4
        vllm.text = "Good."
        assert score_here(run_file, file, tmp_path / "scores.jsonl") == 0
        assert summary(tmp_path)["agreements"][0]["accuracy"] == 1.0
        swapped = "rewards.judges.kind.read_out.verdicts={bad: 0.0, good: 1.0}"
        assert score_here(run_file, file, tmp_path / "scores.jsonl", swapped) == 1
        (tmp_path / "scores.jsonl").unlink()
        asked = len(vllm.asked)
        assert score_here(run_file, file, tmp_path / "scores.jsonl") == 0
        assert len(vllm.asked) == asked
        [spread] = summary(tmp_path)["spreads"]
        assert (spread["count"], spread["cached"], spread["latency_p50_s"]) == (4, 4, None)
        assert read_lines(tmp_path / "scores.jsonl")[0]["judged_by"]["kind"].startswith("judge from /models/judge")


def test_a_server_that_exchanges_its_model_ends_it_with_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAFEWORK_CACHE", str(tmp_path / "cache"))
    vllm, out = Vllm(), tmp_path / "scores.jsonl"

    async def exchanged(request: web.Request) -> web.Response:
        vllm.root = "/models/other" if len(vllm.asked) > CHUNK else vllm.root
        return await vllm(request)

    with stand_in(exchanged) as url:
        file = answers(tmp_path, "kind", 3 * CHUNK)
        assert score_here(served_run(tmp_path, url), file, out) == 1
    assert "error: server s at http://127.0.0.1:" in capsys.readouterr().err
    assert [line["id"] for line in read_lines(out)] == [f"r{number}" for number in range(1, CHUNK + 1)]
