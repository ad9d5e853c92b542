"""`python -m benchmarks [names]`: run the measurements, write `results/*.json` and `results/summary.md`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import blob, chaos, core, fidelity, race, soak, startup
from benchmarks.kit import RESULTS, Report, parser

_FULL: dict[str, Callable[[], Report]] = {
    "core": core.run,
    "race": race.run,
    "chaos": chaos.run,
    "fidelity": fidelity.run,
    "blob": blob.run,
    "startup": startup.run,
    "soak": soak.run,
}
_QUICK: dict[str, Callable[[], Report]] = {
    "core": lambda: core.run(n_events=50_000, repeats=3),
    "race": lambda: race.run(n_races=40),
    "chaos": lambda: chaos.run(seconds=chaos.QUICK_SECONDS),
    "fidelity": lambda: fidelity.run(n_requests=fidelity.QUICK_REQUESTS),
    "blob": lambda: blob.run(n_mib=blob.QUICK_MIB),
    "startup": lambda: startup.run(repeats=startup.QUICK_REPEATS),
    "soak": lambda: soak.run(seconds=soak.QUICK_S),
}


def main(argv: list[str] | None = None) -> int:
    """Run what is named, all by default; 1 when a bar was missed."""
    options = parser(__doc__ or "", "python -m benchmarks --quick core race")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_FULL)}; default: all")
    args = options.parse_args(argv)
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
    if args.json:
        import json  # noqa: PLC0415

        print(json.dumps([report.as_object() for report in reports], default=str))
    return 0 if all(all(report.bars.values()) for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
