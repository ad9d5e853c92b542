"""Run the measurements and write `results/*.json`, `results/summary.md` and, with matplotlib, `results/*.png`.

    python -m benchmarks [NAME ...]         all, or those named
    python -m benchmarks compare OLD NEW    two results, or two directories of them, side by side
    python -m benchmarks plots [DIRECTORY]  the plots of the results there

The exit code is 1 when a bar was missed, or when a figure has become worse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarks import (
    blob,
    chaos,
    compare,
    core,
    fidelity,
    memory,
    plots,
    race,
    relay,
    relay_times,
    small,
    soak,
    startup,
)
from benchmarks.kit import RESULTS, Report, parser

_FULL: dict[str, Callable[[], Report]] = {
    "relay": relay.run,
    "relay-times": lambda: relay_times.run(repeats=relay.REPEATS),
    "small": small.run,
    "memory": memory.run,
    "startup": startup.run,
    "core": core.run,
    "race": race.run,
    "chaos": chaos.run,
    "fidelity": fidelity.run,
    "blob": blob.run,
    "soak": soak.run,
}
_QUICK: dict[str, Callable[[], Report]] = {
    "relay": lambda: relay.run(repeats=relay.QUICK_REPEATS),
    "relay-times": lambda: relay_times.run(repeats=relay.QUICK_REPEATS, seconds=relay_times.QUICK_SECONDS),
    "small": lambda: small.run(repeats=small.QUICK_REPEATS, seconds=small.QUICK_SECONDS),
    "memory": lambda: memory.run(repeats=memory.QUICK_REPEATS, numbers=memory.NUMBERS[:1]),
    "startup": lambda: startup.run(repeats=startup.QUICK_REPEATS),
    "core": lambda: core.run(n_events=50_000, repeats=3),
    "race": lambda: race.run(n_races=40),
    "chaos": lambda: chaos.run(seconds=chaos.QUICK_SECONDS),
    "fidelity": lambda: fidelity.run(n_requests=fidelity.QUICK_REQUESTS),
    "blob": lambda: blob.run(n_mib=blob.QUICK_MIB),
    "soak": lambda: soak.run(seconds=soak.QUICK_S),
}
_COMMANDS: dict[str, Callable[[list[str]], int]] = {"compare": compare.main, "plots": plots.main}


def main(argv: list[str] | None = None) -> int:
    """Run what is named, all by default; 1 when a bar was missed."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in _COMMANDS:
        return _COMMANDS[given[0]](given[1:])
    options = parser(__doc__ or "", "python -m benchmarks --quick core race")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_FULL)}; default: all")
    args = options.parse_args(given)
    if unknown := sorted(set(args.names) - set(_FULL)):
        options.error(f"no such measurement: {', '.join(unknown)}")
    reports = []
    for name in args.names or _FULL:
        report = (_QUICK if args.quick else _FULL)[name]()
        report.save()
        if not args.json:
            report.show()
        reports.append(report)
    summary = RESULTS / "summary.md"
    summary.write_text("# Measured\n\n" + "\n".join(report.markdown() for report in reports), encoding="utf-8")
    for line in plots.draw(RESULTS, [report.name for report in reports]):
        print(line, file=sys.stderr)
    if args.json:
        print(json.dumps([report.as_object() for report in reports], default=str))
    return 0 if all(all(report.bars.values()) for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
