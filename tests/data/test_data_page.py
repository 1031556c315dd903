"""Every code block of docs/data.md runs, in a folder that holds what it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa

from tests.processes import amt
from tests.tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
TRAINER = "trainer: {max_steps: 1, accelerator: cpu, logger: false}\nmodel: {model: my-model}\n"


def test_blocks(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=4096).save_pretrained(tmp_path / "my-model")
    tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    turns = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]
    (tmp_path / "math").mkdir()
    (tmp_path / "corpus").mkdir()
    for name in ("chats.jsonl", "chats-val.jsonl", "math/a.jsonl", "math-val.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    with pa.CompressedOutputStream(str(tmp_path / "corpus" / "a.jsonl.zst"), "zstd") as stream:
        stream.write("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)).encode())
    for command in re.findall(r"```bash\n(.*?)\n```", PAGE, re.DOTALL):
        program, *arguments = shlex.split(command)
        assert program == "amt"
        amt(*arguments, "--workers", "1", folder=tmp_path)
    assert (tmp_path / "tokens" / "shard-00000.idx").is_file()
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(TRAINER + block)
        amt("fit", "--config", f"{number}.yaml", "--trainer.default_root_dir", f"run{number}", folder=tmp_path)
