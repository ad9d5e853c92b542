"""`ollama-lb what-if`: the requests of an event log again, on servers fitted to it, under another config or fleet.

First the log's own configuration is run on the fitted servers and held against what was recorded: how much the rest can
be believed. Then the other one, beside both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lbcore.config import Config, ServerSettings
from lbcore.parsing import choice_fix, quote
from lbcore.schema import SECOND_NS
from lbcore.trace import LogError
from simulator.fakes.specs import FakeSpec
from simulator.profiles import profile, profile_names, speed_of
from simulator.reports.figures import figure_of
from simulator.reports.results import Outcome, RequestResult, RunResult
from simulator.reports.summary import flat, quantiles, summarise
from simulator.scenario import Scenario, run_scenario
from simulator.sweeps.fit import (
    READ_RATE,
    SAMPLES_MIN,
    Fit,
    Recorded,
    RecordedSource,
    average,
    fit,
    read_log,
    recorded_results,
)
from simulator.tables import add, figure_text, new_console, new_table, printable, say, show

EXIT_OK = 0
EXIT_BAD_INPUT = 2

FIGURES = (
    "requests", "completed", "failed", "rejected", "left", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms",
    "e2e_p50_ms", "e2e_p90_ms", "e2e_p99_ms", "amplification", "wasted_tokens_pct", "utilisation_pct",
)  # fmt: skip
COMPARED = ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p90_ms", "e2e_p99_ms")
GOOD, FAIR = 0.10, 0.25
"""Errors of a fit at p50 and p90 up to which it is called good, or fair."""
_SETTLE_NS = 3600 * SECOND_NS


class WhatIfError(ValueError):
    """Something asked for cannot be done, in words for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is to be different."""

    config: Config | None = None  # None: as recorded
    config_name: str = ""
    servers: tuple[str, ...] = ()  # "+NAME:PROFILE or SERVER", "-NAME"
    speed: float = 1.0  # the requests come so many times faster

    @property
    def words(self) -> str:
        """What it is, for a heading."""
        parts = [self.config_name, *self.servers, *([f"x {self.speed:g}"] if self.speed != 1.0 else [])]
        return ", ".join(part for part in parts if part) or "as recorded"


def what_if(path: Path, change: Change, *, as_json: bool = False) -> int:
    """Print what the change would have come to. Returns the exit status."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            found = read_log(file)
        answer = answer_of(found, change)
    except OSError as error:
        return _refuse(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}")
    except LogError as error:
        return _refuse(f"{path}:{error.line}: {error.message}")
    except WhatIfError as error:
        return _refuse(str(error))
    if as_json:
        click.echo(json.dumps(answer.as_object(), allow_nan=False))
    else:
        print_answer(answer, new_console())
    return EXIT_OK


def _refuse(message: str) -> int:
    click.echo(message, err=True)
    return EXIT_BAD_INPUT


# --- the answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Figures by name: as recorded, of the fitted servers under the same configuration, and under the change."""

    recorded: Mapping[str, float]
    fitted: Mapping[str, float]
    changed: Mapping[str, float]
    change: str
    errors: Mapping[str, float]  # of the fit, as shares of what was recorded
    guessed: tuple[str, ...]
    truncated: int | None

    @property
    def verdict(self) -> str:
        """How far the fit can be believed."""
        worst = max((abs(e) for name, e in self.errors.items() if "p99" not in name), default=1.0)
        return "good" if worst <= GOOD else "fair" if worst <= FAIR else "poor"

    def as_object(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "fit": {"verdict": self.verdict, "errors": dict(self.errors), "guessed": list(self.guessed)},
            "change": self.change,
            "recorded": dict(self.recorded),
            "fitted": dict(self.fitted),
            "changed": dict(self.changed),
            "truncated_at_line": self.truncated,
        }


def answer_of(found: Recorded, change: Change) -> Answer:
    """Return what a change would have come to. Raises WhatIfError."""
    if not found.requests:
        raise WhatIfError("the log has no request in it: there is nothing to ask it")
    fitted = fit(found)
    recorded = _finite(_figures_of_log(recorded_results(found)))
    as_recorded = _finite(_run(found, fitted, found.config, fitted.specs, 1.0))
    config, specs = _changed(found, fitted, change)
    changed = _finite(_run(found, fitted, config, specs, change.speed))
    errors = {
        name: as_recorded[name] / recorded[name] - 1 for name in COMPARED if recorded.get(name) and name in as_recorded
    }
    return Answer(recorded, as_recorded, changed, change.words, errors, fitted.guessed, found.truncated)


def _run(found: Recorded, fitted: Fit, config: Config, specs: Sequence[FakeSpec], speed: float) -> dict[str, float]:
    slots = {spec.name: spec.num_parallel for spec in specs}
    servers = tuple(replace(server, slots=slots[server.name]) for server in config.servers)
    scenario = Scenario(
        name="what-if",
        about="",
        config=replace(config, servers=servers),
        specs=tuple(specs),
        workload=(),
        duration_ns=max(1, round((found.ended_ns - found.began_ns) / speed)),
        settle_ns=_SETTLE_NS,
    )
    result: RunResult = run_scenario(scenario, source=RecordedSource(found, fitted, speed))
    return flat(summarise(result))


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name in FIGURES and not isnan(value)}


def _figures_of_log(requests: Sequence[RequestResult]) -> dict[str, float]:
    """Return what of a run's figures can be told of a log."""
    n = len(requests)
    shares = {
        "completed": Outcome.COMPLETED,
        "failed": Outcome.FAILED,
        "rejected": Outcome.REJECTED,
        "left": Outcome.LEFT,
    }
    figures: dict[str, float] = {"requests": float(n)}
    for name, outcome in shares.items():
        figures[name] = sum(request.outcome is outcome for request in requests) / n
    ttft = quantiles(request.ttft_ns for request in requests if request.ttft_ns is not None)
    e2e = quantiles(request.e2e_ns for request in requests if request.outcome is Outcome.COMPLETED)
    for name, of in (("ttft", ttft), ("e2e", e2e)):
        for share, value in (("p50", of.p50_ns), ("p90", of.p90_ns), ("p99", of.p99_ns)):
            if value is not None:
                figures[f"{name}_{share}_ms"] = value / 1e6
    figures["amplification"] = sum(request.n_attempts for request in requests) / n
    return figures


# --- the change --------------------------------------------------------------------------------------------------


def _changed(found: Recorded, fitted: Fit, change: Change) -> tuple[Config, tuple[FakeSpec, ...]]:
    """Return the configuration and the servers that the change asks for."""
    specs = {spec.name: spec for spec in fitted.specs}
    config = change.config or found.config
    if change.config is not None and change.config.servers:
        named = [server.name for server in change.config.servers]
        unknown = [name for name in named if name not in specs]
        added = {words[1:].partition(":")[0] for words in change.servers if words.startswith("+")}
        if missing := [name for name in unknown if name not in added]:
            raise WhatIfError(
                f"{change.config_name}: servers {', '.join(missing)} are not in the log; "
                f"say what they are like, as in --servers +{missing[0]}:rtx4090"
            )
        specs = {name: spec for name, spec in specs.items() if name in named}
    for words in change.servers:
        _apply(words, specs, fitted)
    if not specs:
        raise WhatIfError("--servers: no server is left")
    settings = {server.name: server for server in (*found.config.servers, *config.servers)}
    servers = tuple(
        settings.get(name) or ServerSettings(url=f"http://{name}", name=name, slots=spec.num_parallel)
        for name, spec in specs.items()
    )
    by_name = {server.name: server.slots for server in servers}
    return replace(config, servers=servers), tuple(
        replace(spec, num_parallel=by_name[spec.name]) for spec in specs.values()
    )


def _apply(words: str, specs: dict[str, FakeSpec], fitted: Fit) -> None:
    """Add or remove one server."""
    sign, rest = words[:1], words[1:]
    name, _, like = rest.partition(":")
    if sign == "-" and name in specs and not like:
        del specs[name]
    elif sign == "+" and name and like and name not in specs:
        specs[name] = _new_server(name, like, fitted)
    elif sign == "+" and name in specs:
        raise WhatIfError(f"--servers {words}: there is a server {name} already")
    elif sign == "-":
        raise WhatIfError(f"--servers {words}: no such server; there are {', '.join(specs)}")
    else:
        raise WhatIfError(f"--servers {words}: write +NAME:PROFILE, +NAME:SERVER or -NAME, as in +gpu5:rtx4090")


def _new_server(name: str, like: str, fitted: Fit) -> FakeSpec:
    """Return a server like another one of the log, or of known hardware.

    Prompts are measured by the time they took, so that hardware reads them faster by as much as it decodes faster than
    the average server of the log.
    """
    known = {spec.name: spec for spec in fitted.specs}
    if like in known:
        return replace(known[like], name=name, faults=())
    if like not in profile_names():
        fix = choice_fix(like, [*known, *profile_names()])
        what = f"{quote(like)} is no server of the log and no known hardware"
        raise WhatIfError(f"--servers +{name}:{like}: {what}; {fix}")
    hardware = profile(like)
    template = max(fitted.specs, key=lambda spec: len(spec.speeds))
    speeds = []
    for model in template.models:
        usual = average([spec.speed(model.name) for spec in fitted.specs])
        new = speed_of(hardware, size_bytes=model.size_bytes)
        rate = READ_RATE * usual.token_ns / max(1, new.token_ns)
        speeds.append((model.name, replace(new, prefill_rate=rate)))
    return replace(template, name=name, speeds=tuple(speeds), faults=())


# --- for people --------------------------------------------------------------------------------------------------


def print_answer(answer: Answer, console: Console) -> None:
    """Print how good the fit is, then the figures side by side."""
    parts = [f"{name.removesuffix('_ms').replace('_', ' ')} {error:+.0%}" for name, error in answer.errors.items()]
    say(console, f"the fitted servers reproduce what was recorded: {answer.verdict} ({', '.join(parts)})")
    if answer.verdict == "poor":
        say(console, "do not rely on what follows: what made the difference is not in the fit")
    if answer.guessed:
        more = f" and {len(answer.guessed) - 5} more" if len(answer.guessed) > 5 else ""
        named = ", ".join(map(printable, answer.guessed[:5]))
        say(console, f"taken for average, since fewer than {SAMPLES_MIN} answers were seen: {named}{more}")
    if answer.truncated is not None:
        say(console, f"the log breaks off in line {answer.truncated}; what comes before it was used")
    table = new_table("", "figure", "recorded", "fitted", printable(answer.change))
    for name in FIGURES:
        figure = figure_of(name)
        cells = (of.get(name) for of in (answer.recorded, answer.fitted, answer.changed))
        add(table, name, *("-" if value is None else figure_text(figure, value) for value in cells))
    show(console, table)


def parse_servers(words: Iterable[str]) -> tuple[str, ...]:
    """Return the changes of `--servers`, of which one flag may name several, separated by commas."""
    return tuple(part.strip() for word in words for part in word.split(",") if part.strip())
