"""`ollama-lb …`: the command line. Only click is imported up here; everything else when a command needs it."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lbcore import __version__
from lbcore.compiled import is_compiled
from lbio.subcommands.key_command import key
from lbio.subcommands.models_command import models
from lbio.subcommands.why_command import why

# ruff: noqa: PLC0415  # `--help` must not wait for what it does not need

if TYPE_CHECKING:
    from lbcore.parsing import Problem
    from lbio.configuration.settings import AppConfig
    from lbio.service import FleetFactory
    from simulator.fakes.specs import FakeSpec

_C = TypeVar("_C", bound=Callable[..., Any])

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130

_EXAMPLE_SERVERS = ("http://gpu1:11434=gpu1", "http://gpu2:11434=gpu2")


def _examples(*lines: str) -> str:
    """Return an epilog that click does not rewrap."""
    return "\n".join(("\b", "Examples:" if len(lines) > 1 else "Example:", *(f"  {line}" for line in lines)))


_FLAGS: Sequence[Callable[[Any], Any]] = (
    click.option("-l", "--listen", metavar="ADDRESS",
                 help="Where clients connect: host:port, :port or port. [default: 0.0.0.0:11434]"),
    click.option("-s", "--servers", multiple=True, metavar="URL[=NAME]",
                 help="An Ollama server; repeatable. Replaces the servers of CONFIG."),
    click.option("--server-file", type=click.Path(path_type=Path), metavar="FILE",
                 help="Servers from a file, one URL[=NAME] a line, # begins a comment. They come after those of "
                      "--servers and replace those of CONFIG."),
    click.option("--timeout", metavar="TIME",
                 help="How long a server may be silent within an answer, from one token to the next, before it has "
                      "failed. Connecting to a server takes no longer either. [timeouts.silence; default: 1m]"),
    click.option("--timeout-ft", metavar="TIME",
                 help="How long a server that has the model in memory may take to the first token of an answer, before "
                      "it has failed. One that must load the model: 10m, or this if it is more. "
                      "[timeouts.first_token_warm; default: 2m]"),
    click.option("--time-measure", metavar="TIME",
                 help='For race.winner = "most-tokens" only: from the first token on, how long racers are compared '
                      "before the one with the most tokens wins. [race.measure; default: 2s]"),
)


def _with_flags(command: _C) -> _C:
    """Add the flags that win over the file."""
    for option in reversed(_FLAGS):
        command = option(command)
    return command


_CONFIG_OPTIONAL = click.argument("config", required=False, metavar="[CONFIG]")
_CONFIG = click.argument("config", metavar="CONFIG")


def _request_id(text: str) -> int:
    """Return the number of a request that is named by it, or as the log does: `#f08f-17` is 17."""
    number = text.removeprefix("#").rpartition("-")[2]
    if not (number.isascii() and number.isdigit() and len(number) < 20 and int(number)):
        fix = "write its number, or its id from the log, such as '#f08f-17'"
        raise click.BadParameter(f"'{text}' is no request; {fix}")
    return int(number)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
             epilog=_examples("ollama-lb run -s http://gpu1:11434=gpu1 -s http://gpu2:11434=gpu2",
                              "ollama-lb run my.toml", "ollama-lb check my.toml"))
@click.version_option(__version__, prog_name="ollama-lb",
                      message=f"%(prog)s %(version)s (core: {'compiled' if is_compiled() else 'pure Python'})")
def cli() -> None:
    """One fast, dependable Ollama out of many: races chat requests over N servers."""


for _command in (key, models, why):
    cli.add_command(_command)


# --- commands ----------------------------------------------------------------------------------------------


@cli.command(epilog=_examples("ollama-lb run configs/demo.toml", "ollama-lb run my.toml --listen 127.0.0.1:11434",
                              "ollama-lb run -s http://gpu1:11434=gpu1 -s http://gpu2:11434=gpu2"))
@_CONFIG_OPTIONAL
@_with_flags
def run(config: str | None, **flags: Any) -> int:
    """Run the balancer, as CONFIG and the flags say; flags win.

    A TIME is a number of seconds, or has a unit: 300ms, 1.5s, 5m, 1h30m. Exits with 2 when something is wrong with
    CONFIG or a flag, with 1 when it cannot start, as when the port is taken.
    """
    specs: list[FakeSpec] = []
    gc.disable()  # a tenth of the start is a search for garbage among what stays; the service enables it
    try:
        app = _load(config, flags, specs)
        if app is None:
            return EXIT_CONFIG
        from lbio.service import run as run_service

        return run_service(app, fleet=_demo_fleet(specs) if specs else None)
    finally:
        gc.enable()


def _demo_fleet(specs: Sequence[FakeSpec]) -> FleetFactory:
    """Return what starts the fake servers beside the balancer, in the same process."""
    import contextlib

    from lbcore.config import ServerSettings
    from simulator.serve import serve_fleet

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[Sequence[ServerSettings]]:
        async with serve_fleet(specs) as fleet:
            yield [ServerSettings(url=fake.url, name=fake.spec.name, slots=fake.spec.num_parallel,
                                  in_flight_max=fake.spec.in_flight_max) for fake in fleet]

    return start


@cli.command(epilog=_examples("ollama-lb check my.toml", "ollama-lb check my.toml --json",
                              "ollama-lb check -s http://gpu1:11434=gpu1"))
@_CONFIG_OPTIONAL
@_with_flags
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def check(config: str | None, *, as_json: bool, **flags: Any) -> int:
    """Tell what CONFIG and flags come to, or all that is wrong.

    Takes what run takes, starts nothing, and exits with 0, or with 2 and every problem: its key, its value and how to
    write it right.
    """
    import dataclasses
    import json

    from lbio.configuration.summary import found_at_start, problems_object, summary_lines, summary_object

    report = (lambda problems: click.echo(json.dumps(problems_object(problems), default=str))) if as_json else None
    app = _load(config, flags, [], report=report, quiet=True)
    if app is None:
        return EXIT_CONFIG
    problems, warnings = found_at_start(app)
    if problems:
        (report or _report)(problems)
        return EXIT_CONFIG
    app = dataclasses.replace(app, warnings=(*app.warnings, *warnings))
    if as_json:
        click.echo(json.dumps(summary_object(app)))
    else:
        click.echo("\n".join((f"{config or 'flags'}: ok", *summary_lines(app))))
    return EXIT_OK


@cli.command(epilog=_examples("ollama-lb init -s http://gpu1:11434=gpu1 > my.toml", "ollama-lb init --full > my.toml"))
@_with_flags
@click.option("--full", is_flag=True, help="Write every key, with its meaning, unit and default.")
def init(*, full: bool, **flags: Any) -> int:
    """Write a CONFIG with what the flags say to standard output."""
    from lbio.configuration.config_text import document, dump

    named = bool(flags["servers"]) or flags["server_file"] is not None
    app = _load(None, flags if named else {**flags, "servers": _EXAMPLE_SERVERS}, [])
    if app is None:
        return EXIT_CONFIG
    if not named:
        _warn("no server is named: gpu1 and gpu2 are examples")
    click.echo(document(app) if full else f"{_INIT_HEAD}\n{dump(app)}", nl=False)
    return EXIT_OK


_INIT_HEAD = """\
# The configuration of ollama-lb; what is not named here has its default.
# `ollama-lb init --full` writes every key with its meaning, `ollama-lb check FILE` tells what a file comes to.
"""


@cli.command(epilog=_examples("ollama-lb fleet configs/demo.toml"))
@_CONFIG
def fleet(config: str) -> int:
    """Serve only the fake Ollama servers of CONFIG, until Ctrl-C.

    They are the [[fleet]] tables of the file. run starts them too, with the balancer in front of them.
    """
    from lbcore.parsing import ABSENT, Problem

    specs: list[FakeSpec] = []
    if _load(config, {}, specs, need_servers=False) is None:
        return EXIT_CONFIG
    if not specs:
        problem = Problem("fleet", ABSENT, "no fake server is named", 'write [[fleet]] and below it name = "one"')
        _report([problem])
        return EXIT_CONFIG
    from simulator.fleet_cli import serve_until_told

    return serve_until_told(specs)


@cli.command(epilog=_examples("ollama-lb replay events.jsonl", "ollama-lb replay events.jsonl --at 17"))
@click.argument("log", type=click.Path(path_type=Path), metavar="LOG")
@click.option("--at", type=_request_id, metavar="ID",
              help="Explain one request: who was asked, and why not the others. ID is 17, or '#f08f-17' as in the log.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def replay(log: Path, *, at: int | None, as_json: bool) -> int:
    """Replay a log of [record], and see that the same is decided.

    LOG is the file that [record] names, or one of those before it. Exits with 1 at the first difference, and shows it;
    with 2 if the log cannot be read.
    """
    from lbio.journal.replay import replay as replay_log

    return replay_log(log, at=at, as_json=as_json)


# --- configuration -----------------------------------------------------------------------------------------


_POLICIES = (  # of simulator.policies.known, which `--help` need not import
    "round-robin", "random", "least-in-flight", "power-of-two", "weighted-health", "peak-ewma", "prequal",
    "race-2", "race-3", "race-4", "race-budget", "hedge-p95", "hedge-adaptive", "session-affinity", "oracle",
    "original",
)


@cli.command(epilog=_examples("ollama-lb simulate configs/scenarios/one-server-hangs.toml --plot out.png",
                              "ollama-lb simulate configs/scenarios --seeds 20",
                              "ollama-lb simulate my.toml --policy least-in-flight --explain 17",
                              "ollama-lb simulate --swarm 1000 --save failing"))
@click.argument("paths", nargs=-1, metavar="SCENARIO...", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Of everything random. [default: the scenario's]")
@click.option("--seeds", type=click.IntRange(1, 1_000_000), default=1, metavar="N",
              help="Run so many seeds, from --seed on, on all cores.")
@click.option("--policy", metavar="NAME", default="",
              help=f"Under another policy than the one configured: {', '.join(_POLICIES)}.")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the run.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Write its event log.")
@click.option("--explain", type=_request_id, metavar="ID", help="Tell the story of one request instead.")
@click.option("--audit/--no-audit", default=True, help="Check every invariant after every event. [default: audit]")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: one for each core]")
@click.option("--swarm", "n_swarm", type=click.IntRange(1), metavar="N",
              help="Run N scenarios drawn at random instead, from --seed (1) on.")
@click.option("--save", type=click.Path(path_type=Path), metavar="DIR",
              help="Write those of a swarm that fail as files.")
def simulate(n_swarm: int | None, save: Path | None, **wanted: Any) -> int:
    """Run scenarios in virtual time, and judge what came of them.

    Fake servers, their faults, the clients and the balancer all run in one process, much faster than real time.
    SCENARIO is a TOML file or a folder of them. Exits with 1 when an expectation or an invariant does not hold.
    """
    if bool(wanted["paths"]) == (n_swarm is not None):
        raise click.UsageError("Name a SCENARIO, or --swarm N." if n_swarm is None else "--swarm takes no SCENARIO.")
    if n_swarm is not None:
        from simulator.sweeps.swarm import swarm

        return swarm(n_swarm, 1 if wanted["seed"] is None else wanted["seed"], save=save, workers=wanted["workers"])
    if save is not None:
        raise click.UsageError("--save is for --swarm.")
    from simulator.cli import Wanted
    from simulator.cli import simulate as run_scenarios

    return run_scenarios(Wanted(**wanted))


@cli.command("what-if", epilog=_examples("ollama-lb what-if log.jsonl --config other.toml",
                                         "ollama-lb what-if log.jsonl --servers +gpu5:rtx4090 --speed 1.5",
                                         "ollama-lb what-if log.jsonl --servers -gpu2,+gpu3:gpu1"))
@click.argument("log", type=click.Path(path_type=Path), metavar="LOG")
@click.option("--config", metavar="CONFIG", help="Decide as this file says; without [[servers]], over those of LOG.")
@click.option("--servers", multiple=True, metavar="+NAME:LIKE|-NAME",
              help="Add a server like known hardware or like one of LOG, or remove one; repeatable.")
@click.option("--speed", type=click.FloatRange(0.01, 100.0), default=1.0, metavar="X",
              help="The requests come so many times faster.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def what_if(log: Path, config: str | None, servers: tuple[str, ...], speed: float, *, as_json: bool) -> int:
    """Ask a log what another configuration or fleet had done.

    LOG is what [record] writes. Its requests run again on simulated servers whose speeds are fitted to it; how well
    these reproduce what was recorded is said first.
    """
    from simulator.sweeps.whatif import Change, parse_servers
    from simulator.sweeps.whatif import what_if as ask

    app = None if config is None else _load(config, {}, [], need_servers=False)
    if config is not None and app is None:
        return EXIT_CONFIG
    change = Change(config=app.core if app is not None else None, config_name=config or "",
                    servers=parse_servers(servers), speed=speed)
    return ask(log, change, as_json=as_json)


@cli.command(epilog=_examples("ollama-lb bench configs/bench/quick.toml",
                              "ollama-lb bench configs/bench/*.toml --results runs.jsonl --csv table.csv --plot plot",
                              "ollama-lb bench my.toml --dask tcp://gpu1:8786"))
@click.argument("paths", nargs=-1, required=True, metavar="BENCH...", type=click.Path(path_type=Path))
@click.option("--results", type=click.Path(path_type=Path), metavar="FILE.jsonl",
              help="Keep each run as it ends; those that FILE has are not run again.")
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE.csv", help="Write every figure as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="PREFIX",
              help="Draw PREFIX-pareto.png, p99 TTFT against waste, and PREFIX-load.png, against load if it varies.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: one for each core]")
@click.option("--dask", metavar="ADDRESS", default="", help="Run on the Dask cluster of this scheduler.")
def bench(**wanted: Any) -> int:
    """Compare policies over scenarios, loads and seeds.

    BENCH is a TOML file, or a folder of them, that names scenarios, policies, loads and the number of seeds. Exits with
    1 when a run violated an invariant.
    """
    from simulator.sweeps.bench import Wanted
    from simulator.sweeps.bench import bench as run_bench

    return run_bench(Wanted(**wanted))


def _load(config: str | None, flags: Mapping[str, Any], specs: list[FakeSpec], *, need_servers: bool = True,
          quiet: bool = False, report: Callable[[Iterable[Problem]], None] | None = None) -> AppConfig | None:
    """Return the configuration and fill `specs` with its fake servers; None after its problems were reported."""
    from lbio.config_file import ConfigError, config_path, load

    def check_fleet(tables: Sequence[Mapping[str, Any]], problems: list[Problem]) -> None:
        from simulator.fleet import parse_fleet

        specs.extend(parse_fleet(tables, problems))

    try:
        path = None if config is None else config_path(config, servers_allowed=need_servers)
        app = load(path, _overrides(flags), need_servers=need_servers, check_fleet=check_fleet)
    except ConfigError as error:
        (report or _report)(error.problems)
        return None
    for warning in () if quiet else app.warnings:
        _warn(warning)
    return app


def _overrides(flags: Mapping[str, Any]) -> Any:
    from lbio.config_file import Overrides

    return Overrides(
        listen=flags.get("listen"), servers=tuple(flags.get("servers", ())), server_file=flags.get("server_file"),
        timeout_s=flags.get("timeout"), timeout_ft_s=flags.get("timeout_ft"), time_measure_s=flags.get("time_measure"))


def _report(problems: Iterable[Problem]) -> None:
    for problem in problems:
        click.echo(str(problem), err=True)


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


# --- entry point -------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nobody gets a traceback for a mistake of their own."""
    from lbio.configuration.standard_files import give_up_output, open_closed

    open_closed()
    try:
        result = cli.main(args=args, prog_name="ollama-lb", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OSError as error:  # such as standard output on a full disk
        give_up_output()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
