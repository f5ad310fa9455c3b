"""Which tensors patterns freeze, and what is said of patterns that freeze none or all."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import ConfigError, load_config
from common.data.frozen import frozen_names
from common.data.model_config import read_model_config
from common.data.model_weights import tensor_shapes
from common.experiment import policy_folder
from tests.tiny import make_model
from tests.training import write_run


def test_patterns_match_whole_names(tmp_path: Path) -> None:
    names = tensor_shapes(read_model_config(make_model(tmp_path / "model", num_hidden_layers=12)))
    assert frozen_names(names, []) == frozenset()
    assert frozen_names(names, ["model.norm.*", "lm_head.weight"]) == {"model.norm.weight", "lm_head.weight"}
    # Layer 1, and neither 10 nor 11; a point is a point.
    assert {name.split(".")[2] for name in frozen_names(names, ["model.layers.1.*"])} == {"1"}
    assert {name.split(".")[2] for name in frozen_names(names, ["model.layers.[0-3].*"])} == set("0123")
    assert len(frozen_names(names, ["*_proj.weight"])) == 7 * 12


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["lm_head.*", "visual.*"], "'visual.*' matches no tensor of the model"),
        (["norm.weight"], "'norm.weight' matches no tensor of the model"),
        (["model.*", "lm_head.weight"], "matches every tensor of the model, so nothing would be trained"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_with_their_key(
    patterns: list[str], said: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path, make_model(tmp_path / "model"), model={"frozen": patterns})
    with pytest.raises(ConfigError) as refused:
        policy_folder(load_config([run]))
    assert str(refused.value).startswith(f"model.frozen = {patterns} ({run}:1): ") and said in str(refused.value)
