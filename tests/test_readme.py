"""The README's examples run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import classifier

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:LCodec raised the damping")
def test_the_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    model, forget, retain = classifier()
    names = {"model": model, "forget": [(x[:2], y[:2]) for x, y in forget], "retain": retain, "test": retain[:1]}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)
    assert "membership_auc" in capsys.readouterr().out
