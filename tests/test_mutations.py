import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import KINDS, mutate

ROOT = Path(__file__).parents[1]
FEW, MANY = 8, 300  # files of each kind: 72 in all, and 2,700
MINUTES = 20


def read_damaged(kinds: str, count: int, seed: int) -> str:
    """Read damaged files in a process of limited memory; what it printed, once it has ended well."""
    command = [sys.executable, "-m", "tests.mutations", kinds, str(count), str(seed)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    started = result.stdout.splitlines()
    last = started[-1] if started else "nothing was read"
    how = f"signal {-result.returncode}" if result.returncode < 0 else f"status {result.returncode}"
    assert result.returncode == 0, f"{last} ended the process with {how}:\n{result.stderr[-2000:]}"
    return result.stdout


def check_counts(output: str, count: int) -> None:
    for kind in KINDS:
        line = re.search(rf"^{kind}: {count} files, (.*)$", output, re.MULTILINE)
        assert line is not None
        refused = sum(int(n) for n in re.findall(r"(\d+) refused", line[1]))
        accepted = sum(int(n) for n in re.findall(r"(\d+) accepted", line[1]))
        assert refused + accepted == count
        assert refused > count // 10, f"{kind}: {line[1]}"
    print(*re.findall(r"^\w+: .*$", output, re.MULTILINE), sep="\n")


@pytest.mark.heavy
def test_mutations__few_of_every_kind() -> None:
    check_counts(read_damaged(",".join(KINDS), FEW, seed=1), FEW)


@pytest.mark.slow
def test_mutations__many_of_every_kind() -> None:
    check_counts(read_damaged(",".join(KINDS), MANY, seed=0), MANY)


def test_mutate__the_same_number_gives_the_same_bytes() -> None:
    good, donor = bytes(range(256)), b"another file"
    damaged = [mutate(good, donor, random.Random(f"{i}")) for i in range(200)]
    assert damaged == [mutate(good, donor, random.Random(f"{i}")) for i in range(200)]
    assert len(set(damaged)) > 150
    assert sum(d == good for d in damaged) < 10
