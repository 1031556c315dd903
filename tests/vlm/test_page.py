"""Every block of docs/vlm.md runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.vlm.families import folder_of, rows

PAGE = Path(__file__).parents[2] / "docs" / "vlm.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of("llava", tmp_path).rename("my-vlm")
    Path("pictures.jsonl").write_text("\n".join(map(json.dumps, rows(tmp_path, 12))))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("max_steps=4", "max_steps=1, accelerator='cpu'"), str(PAGE), "exec"), {})
    assert (tmp_path / "tuned" / "processor_config.json").is_file()
