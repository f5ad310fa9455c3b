"""`safework parity` as a user runs it: every rung passes on each family and on the embedded model, the certificate says
what was compared, and whatever differs makes its own rung fail.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.config import load_config
from common.data.embedded_model import embedded_model
from common.parity.ladder import PACKAGES, Rung, compare, compare_relays
from tests.full_disk import small_disk
from tests.runs import finish, safework, start
from tests.tiny import make_model
from tests.training import ROOT, write_run

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
}
# One rung each, of several of one kind.
RUNGS = (
    "greedy tokens that differ",
    "logprob difference",
    *(f"loss {kind}" for kind in ("own/on", "own/off", "cpgd/off", "gspo/off", "cispo/on", "k1_reward/off")),
    *(f"gradient in logprobs, {kind}" for kind in ("ppo_clip/off", "cross_entropy/on", "rho_k3_loss/off")),
    *(f"gradient {figure}, {policy}-policy" for figure in ("1 - cosine", "relative L2") for policy in ("on", "off")),
    *(f"{what}, same gradients" for what in ("update", "first moment", "second moment")),
    "update, live gradients",
)
RELAY = ("state taken over", "update", "first moment", "second moment", "loss", "mean logprob")
RELAYS = tuple(f"{order}, {what}" for order in ("torch then jax", "jax then torch") for what in RELAY)


def passed_certificate(file: Path, model: Path | str, num_batches: int) -> None:
    """The certificate of a passed ladder, complete."""
    certificate = json.loads(file.read_text())
    assert certificate["passed"] is True
    assert certificate["model"] == str(model) and certificate["batches"] == num_batches
    assert certificate["versions"] == {name: metadata.version(name) for name in PACKAGES}
    assert len(bytes.fromhex(certificate["recording_sha256"])) == hashlib.sha256().digest_size
    rungs = {rung["name"]: rung for rung in certificate["rungs"]}
    steps = tuple(f"{what} over {num_batches} replayed steps" for what in ("loss", "mean logprob"))
    assert {*RUNGS, *steps} <= rungs.keys()
    assert rungs.keys() & {*RELAYS} == ({*RELAYS} if num_batches > 1 else set())  # half of one step is none
    for name, rung in rungs.items():
        assert rung["passed"] is True and 0 <= rung["figure"] <= rung["limit"], name


@pytest.mark.parametrize("model_type", MODELS)
def test_every_rung_passes_over_replayed_steps(model_type: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", model_type, **MODELS[model_type])
    frozen = ["model.embed_tokens.*", "model.layers.1.*", "*.o_proj.weight"] if model_type == "qwen3" else []
    run = write_run(tmp_path, model, batch={"share_prompts": model_type == "llama"}, model={"frozen": frozen})
    steps = 20 if model_type == "llama" else 4
    done = safework("parity", run, "--steps", str(steps), "--out", tmp_path / "parity.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity.json: passed" in "".join(done.stdout.split("\n"))
    passed_certificate(tmp_path / "parity.json", model, steps)


def test_a_failed_ladder_is_a_failed_command(tmp_path: Path) -> None:
    """Logits with a large addend in common cannot agree in fp32, on any processor, and leave every token likely."""
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    weights = load_file(model / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": 1e4 + weights["lm_head.weight"]}, model / "model.safetensors", {"format": "pt"}
    )
    done = safework("parity", write_run(tmp_path, model), "--steps", "1", "--out", tmp_path / "parity.json")
    assert done.returncode == 1
    certificate = json.loads((tmp_path / "parity.json").read_text())
    assert certificate["passed"] is False
    failed = [rung["name"] for rung in certificate["rungs"] if not rung["passed"]]
    assert "logprob difference" in failed
    assert f"FAILED: {', '.join(failed)}" in " ".join(done.stdout.split())


def test_a_full_disk_is_said_with_another_place_for_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path, make_model(tmp_path / "model"))
    with small_disk(tmp_path / "disk") as disk:
        done = finish(start("common.cli", "parity", run, "--steps", "1", "--out", tmp_path / "out", TMPDIR=str(disk)))
        assert not list(disk.glob("safework-*"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(rf"error: {disk}/.*safetensors: could not be written \(.+\)\. Make room on the disk", done.stderr)
    assert "or set TMPDIR to a folder with more room." in done.stderr


def test_a_certificate_that_cannot_be_written_comes_after_the_table(tmp_path: Path) -> None:
    run = write_run(tmp_path, make_model(tmp_path / "model", num_hidden_layers=1))
    done = safework("parity", run, "--steps", "1", "--out", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "update, live gradients" in done.stdout
    assert f"error: {tmp_path}: could not be written (Is a directory)" in done.stderr


def test_every_rung_passes_on_the_embedded_model_up_to_one_step(tmp_path: Path) -> None:
    files = [ROOT / "configs" / "data" / f"{name}.jsonl" for name in ("general_rule", "instruction_rule")]
    run = write_run(
        tmp_path,
        embedded_model(),
        backend={"threads": 2},
        data={"train": [{"path": str(file)} for file in files], "max_prompt_tokens": 72},
        rollout={"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 24},
        batch={"row_tokens": 144, "rows_per_microbatch": 2, "share_prompts": True},
    )
    words = (run, "--steps", "1", "--out", tmp_path / "parity.json")
    process = start("common.cli", "parity", *words, TMPDIR=str(tmp_path), XLA_FLAGS="")
    out, error = process.communicate(timeout=1200)
    assert process.returncode == 0, out + error
    passed_certificate(tmp_path / "parity.json", embedded_model(), 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, a recording of two steps, and what torch measures of it, in the folders `recording` and `right`."""
    folder = tmp_path_factory.mktemp("measured")
    write_run(folder, make_model(folder / "model"), batch={"share_prompts": True})
    _torch("record", folder / "recording", "2", folder / "run.yaml")
    measure(folder, folder / "right")
    return folder


def measure(folder: Path, out: Path, *overrides: str) -> None:
    """Torch's side of the ladder, and its steps from where it was right after half of them."""
    right, run = folder / "right", folder / "run.yaml"
    _torch("measure", folder / "recording", right / "gradients-on.safetensors", out, run, *overrides)
    _torch("relay", folder / "recording", right, out, run, *overrides)


def _torch(*words: str | Path) -> None:
    done = finish(start("safework_torch.main", *words))
    assert done.returncode == 0, done.stderr


def failed(folder: Path, other: Path) -> set[str]:
    """Names of the rungs that fail between the right measurement and another one."""
    return {rung.name for rung in compared(folder, folder / "right", other) if not rung.passed}


def compared(folder: Path, left: Path, right: Path) -> list[Rung]:
    """All rungs between two measurements."""
    return [*compare(_config(folder), folder / "recording", left, right), *compare_relays(_config(folder), left, right)]


def _config(folder: Path) -> Any:
    return load_config([folder / "run.yaml"]).config


def test_an_engine_equals_itself(measured: Path, tmp_path: Path) -> None:
    measure(measured, tmp_path / "again")
    assert failed(measured, tmp_path / "again") == set()


def test_a_model_that_is_one_thousandth_off_is_found(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"] *= np.float32(1.001)
    save_file(weights, file, {"format": "pt"})
    measure(measured, tmp_path / "other", f"model.path={tmp_path / 'model'}")
    found = failed(measured, tmp_path / "other")
    assert {"logprob difference", "gradient relative L2, on-policy", "gradient relative L2, off-policy"} <= found
    assert "update, same gradients" in found  # the start differs, so what was added to it does


def scale(file: Path, tensor: str, factor: float) -> None:
    """Multiply one tensor of a safetensors file."""
    tensors = load_file(file)
    tensors[tensor] *= np.float32(factor)
    save_file(tensors, file)


def add_to_array(file: Path, value: float) -> None:
    """Change one number of a npy file by `value`."""
    array = np.load(file)
    array[np.unravel_index(np.abs(array).argmax(), array.shape)] += value
    np.save(file, array)


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def curve_rungs(figure: str) -> set[str]:
    """The rungs that read a figure of an engine's own curve."""
    return {f"{figure} over 2 replayed steps", f"right then other, {figure}", f"other then right, {figure}"}


TENSOR = "model.layers.2.self_attn.k_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a greedy token": (lambda path: add_to_array(path / "greedy.npy", 1), {"greedy tokens that differ"}),
    "a logprob": (lambda path: add_to_array(path / "logprobs.npy", 2e-4), {"logprob difference"}),
    "a logprob that is no number": (lambda path: add_to_array(path / "logprobs.npy", np.nan), {"logprob difference"}),
    "a loss": (
        lambda path: change_json(path / "losses.json", lambda x: x.update({"gspo/off": x["gspo/off"] + 2e-5})),
        {"loss gspo/off"},
    ),
    "a loss that is no number": (
        lambda path: change_json(path / "losses.json", lambda x: x.update({"k2_loss/off": np.nan})),
        {"loss k2_loss/off"},
    ),
    "a gradient in logprobs": (
        lambda path: scale(path / "loss-gradients.safetensors", "cispo/off", 1.001),
        {"gradient in logprobs, cispo/off"},
    ),
    "a gradient's size": (
        lambda path: scale(path / "gradients-off.safetensors", TENSOR, 1.0005),
        {"gradient norm ratio - 1, off-policy"},
    ),
    "a gradient's sign": (
        lambda path: scale(path / "gradients-on.safetensors", TENSOR, -1.0),
        {"gradient 1 - cosine, on-policy", "gradient relative L2, on-policy"},
    ),
    "a gradient that is no number": (
        lambda path: scale(path / "gradients-on.safetensors", "model.norm.weight", np.nan),
        {f"gradient {figure}, on-policy" for figure in ("1 - cosine", "norm ratio - 1", "relative L2")},
    ),
    "a step from the same gradients": (
        lambda path: scale(path / "same-gradients" / "model.safetensors", TENSOR, 1.00001),
        {"update, same gradients"},
    ),
    "a step from live gradients": (
        lambda path: scale(path / "live-gradients" / "model.safetensors", TENSOR, 1.0001),
        {"update, live gradients"},
    ),
    "a first moment": (
        lambda path: scale(path / "same-gradients" / "first_moment.safetensors", TENSOR, 1.001),
        {"first moment, same gradients"},
    ),
    "a second moment": (
        lambda path: scale(path / "same-gradients" / "second_moment.safetensors", TENSOR, 1.001),
        {"second moment, same gradients"},
    ),
    "the end of a curve": (
        lambda path: change_json(path / "curve.json", lambda x: x[-1].update(loss=x[-1]["loss"] + 2e-3)),
        curve_rungs("loss"),
    ),
    "an engine that stands still": (
        lambda path: change_json(path / "curve.json", lambda x: x[-1].update(x[0])),
        curve_rungs("loss") | curve_rungs("mean logprob"),
    ),
    "a curve that is no number": (
        lambda path: change_json(path / "curve.json", lambda x: x[-1].update(mean_logprob=np.nan)),
        curve_rungs("mean logprob"),
    ),
    "a state that is taken over": (
        lambda path: change_json(path / "relay" / "relay.json", lambda x: x.update(differing=1)),
        {"right then other, state taken over"},
    ),
    "the end of a relay": (
        lambda path: scale(path / "relay" / "model.safetensors", TENSOR, 1.0001),
        {"right then other, update"},
    ),
    "a moment of a relay": (
        lambda path: scale(path / "relay" / "first_moment.safetensors", TENSOR, 1.002),
        {"right then other, first moment"},
    ),
    "a moment after all steps": (
        lambda path: scale(path / "end" / "second_moment.safetensors", TENSOR, 1.002),
        {"right then other, second moment", "other then right, second moment"},
    ),
    "the curve of a relay": (
        lambda path: change_json(
            path / "relay" / "relay.json", lambda x: x["replayed"][0].update(loss=x["replayed"][0]["loss"] + 2e-3)
        ),
        {"right then other, loss"},
    ),
    "a relay that stands still": (
        lambda path: change_json(
            path / "relay" / "relay.json",
            lambda x: x["replayed"][-1].update(json.loads((path / "curve.json").read_text())[0]),
        ),
        {"right then other, loss", "right then other, mean logprob"},
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_makes_its_own_rung_fail(what: str, measured: Path, tmp_path: Path) -> None:
    damage, rungs = DAMAGE[what]
    other = tmp_path / "other"
    shutil.copytree(measured / "right", other)
    damage(other)
    assert failed(measured, other) == rungs


def test_agreeing_to_do_nothing_is_no_proof(measured: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(measured / "right", both)
    shutil.copyfile(both / "start" / "model.safetensors", both / "same-gradients" / "model.safetensors")
    scale(both / "same-gradients" / "second_moment.safetensors", TENSOR, 0.0)
    change_json(both / "curve.json", lambda x: x[-1].update(x[0]))
    rungs = compare(_config(measured), measured / "recording", both, both)
    assert {rung.name for rung in rungs if not rung.passed} == {
        "update, same gradients",
        "second moment, same gradients",
        "loss over 2 replayed steps",
        "mean logprob over 2 replayed steps",
    }


def test_what_is_frozen_must_not_move(measured: Path) -> None:
    config = load_config([measured / "run.yaml"], [f"model.frozen=[{TENSOR}]"]).config
    right = measured / "right"
    rungs = [*compare(config, measured / "recording", right, right), *compare_relays(config, right, right)]
    assert {(rung.name, rung.where) for rung in rungs if not rung.passed} == {
        (name, TENSOR) for name in ("update, same gradients", "update, live gradients", "right then right, update")
    }


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("certificate-*.json")), ids=lambda file: file.stem)
def test_the_certificates_kept_here_are_of_this_ladder(file: Path, measured: Path) -> None:
    now = compare(_config(measured), measured / "recording", measured / "right", measured / "right")
    certificate = json.loads(file.read_text())
    rungs = {rung["name"]: rung for rung in certificate["rungs"]}
    assert certificate["passed"] is True and certificate["model"] == "embedded:smollm2"
    # The CPU's is from before the relay.
    assert rungs.keys() - {*RELAYS} == {rung.name.replace("over 2 ", "over 20 ") for rung in now}
    assert rungs.keys() & {*RELAYS} in (set(), {*RELAYS})
    for name, rung in rungs.items():
        assert 0 <= rung["figure"] <= rung["limit"], name


def test_tensors_that_are_missing_are_an_error(measured: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(measured / "right", other)
    tensors = load_file(other / "gradients-on.safetensors")
    del tensors[TENSOR]
    save_file(tensors, other / "gradients-on.safetensors")
    with pytest.raises(ValueError, match=r"hold different tensors: .*k_proj"):
        failed(measured, other)


def test_a_rung_holds_at_its_limit_and_never_without_a_number() -> None:
    assert Rung("any", 1.0, 1.0, "").passed
    assert not Rung("any", 1.1, 1.0, "").passed
    assert not Rung("any", float("nan"), 1.0, "").passed
