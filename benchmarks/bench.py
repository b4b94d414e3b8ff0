"""Run the benchmarks that compare with peers, and write their rows to one table: `make bench`.

    python benchmarks/bench.py --data DIR              # a dataset in COCO layout, for the rows of loading
    python benchmarks/bench.py --only startup,dataloader --data DIR

Each script runs in a process of its own; one that fails, or whose peer is not installed, is named and the others go on.
The rows are written to ``benchmarks/results/cpu/bench.md`` and ``bench.json``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A benchmark and its arguments; ``{data}`` stands for the dataset."""

    file: str
    arguments: tuple[str, ...] = ()


SCRIPTS = {
    "startup": Script("startup.py"),
    "dataloader": Script("dataloader.py", ("{data}",)),
    "evaluation": Script("evaluation.py"),
    "detectors": Script("detectors.py"),
    "deformable_detr": Script("deformable_detr.py", ("--threads", "1", "--clock", "cpu")),
}


def run(script: Script, data: str | None) -> tuple[list[str], list[str]]:
    """Run a script; the lines of its table, and its other output or why there is none."""
    if "{data}" in script.arguments and data is None:
        return [], [f"`{script.file}` was left out: give --data"]
    arguments = [part.format(data=data) for part in script.arguments]
    done = subprocess.run([sys.executable, HERE / script.file, *arguments], capture_output=True, text=True)
    if done.returncode:
        return [], [f"`{script.file}` failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("# ")]
    table = [line for line in lines if line.startswith("|")]
    others = [line for line in lines if line and line not in table]
    return table, others if table else ["```text", *others, "```"]


def as_records(name: str, lines: list[str]) -> list[dict[str, str]]:
    """Rows of a Markdown table as one record each; an empty first cell repeats the one above."""
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    records, row = [], ""
    for cells in table[2:]:
        row = cells[0] or row
        records.append({"benchmark": name, "row": row, **dict(zip(table[0][1:], cells[1:], strict=False))})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="dataset in COCO layout")
    parser.add_argument("--only", default=",".join(SCRIPTS), help="names, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu")
    options = parser.parse_args()
    text, records = ["# Benchmarks side by side"], []
    for name in options.only.split(","):
        lines, notes = run(SCRIPTS[name], options.data)
        text.append("\n".join([f"\n## {name}\n", *notes, "", *lines]))
        print(text[-1], flush=True)
        records += as_records(name, lines)
    (options.out / "bench.md").write_text("\n".join(text) + "\n")
    (options.out / "bench.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
