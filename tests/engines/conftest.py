"""Models of a real size run for seconds: here XLA takes its time over their programs, as it does for users."""

from __future__ import annotations

from tests.runs import ENVIRONMENT

ENVIRONMENT["XLA_FLAGS"] = ""
