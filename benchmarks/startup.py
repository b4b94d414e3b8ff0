"""CPU seconds until the command line has printed its help, side by side with the import that it cannot do without."""

import resource
import subprocess
import sys

from side_by_side import create_parser, print_header

CONTESTANTS = {
    "import lightning.pytorch": ("-c", "import lightning.pytorch"),
    "import torch": ("-c", "import torch"),
    "convnext-det --help": ("-c", "from lightning_convnext_det.cli.main import main; main(['--help'])"),
}


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = create_parser(__doc__)
    parser.set_defaults(repeats=3, threads=1, clock="cpu")
    options = parser.parse_args()
    print_header("Start of a command", options, ("lightning",))
    turns = [{name: cpu_seconds(command) for name, command in CONTESTANTS.items()} for _ in range(options.repeats + 1)][
        1:
    ]  # the first one fills the file cache
    first = next(iter(CONTESTANTS))
    for name in CONTESTANTS:
        own = sorted(turn[name] for turn in turns)
        ratios = sorted(turn[name] / turn[first] for turn in turns)
        middle = len(turns) // 2
        print(f"| help | {name} | {own[middle] * 1e3:.0f} | {ratios[middle]:.3f} | |", flush=True)


if __name__ == "__main__":
    main()
