"""Commands as they are typed, run in this process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sbs_fx.cli import main

MODEL = ["test_vit", "--input-size", "1,32,32", "--num-classes", "10", "--random-weights"]


def run_command(arguments: Sequence[str]) -> int:
    """The exit code of `sbs-fx` with these arguments."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)
