"""Check text files: YAML parses, no line ends in white space, and a file ends with one newline. Exits with 1 if not."""

import sys
from pathlib import Path

import yaml


def problems(path: Path) -> list[str]:
    """What is wrong with a file, each with its line."""
    text = path.read_text(encoding="utf-8")
    found = [
        f"{path}:{number}: white space at the end of the line"
        for number, line in enumerate(text.split("\n"), start=1)
        if line != line.rstrip()
    ]
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{path}: ends without one newline")
    if path.suffix in (".yaml", ".yml"):
        try:
            list(yaml.safe_load_all(text))
        except yaml.YAMLError as error:
            found.append(f"{path}: {error}")
    return found


if __name__ == "__main__":
    found = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(bool(found))
