"""Of the processes of a host one asks the judges; the others open no connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import load_config
from common.serving.in_process import unopened
from common.serving.served import ServerError
from common.serving.servers import Servers
from tests.launch.judged_run import judged_run
from tests.teams import free_port


def test_a_process_that_asks_nothing_connects_to_nothing(tmp_path: Path) -> None:
    loaded = load_config([judged_run(tmp_path, f"http://127.0.0.1:{free_port()}")])
    silent = Servers(loaded, unopened, asks=False)
    assert "another process" in silent.open("taste").identity
    silent.close()
    with pytest.raises(ServerError, match="server taste: "):
        Servers(loaded, unopened).open("taste")
