"""`ollama-lb models …`: where declared models are, and what would be done. Only click is imported up here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lbio.subcommands.ask_running import (
    EXIT_CANNOT_ASK,
    EXIT_OK,
    CannotAskError,
    UnknownError,
    ask,
    with_running,
)

# ruff: noqa: PLC0415  # `--help` must not wait for what it does not need

if TYPE_CHECKING:
    from lbcore.balancer import LoadBalancer
    from lbcore.provision import Provision

EXIT_FAILED = 1
EXIT_CONFIG = 2


NONE_DECLARED = "no [[models]] are declared: nothing is pulled, loaded or deleted by itself"


class _WithPlan(click.Group):
    """Says which command reads a file, where one is given to the command that asks a running balancer."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not args[0].endswith(".toml"):
                raise
            fix = f"Did you mean `ollama-lb models plan {args[0]}`?"
            raise click.UsageError(f"{error.message} {fix}", ctx) from None


@click.group(cls=_WithPlan, invoke_without_command=True,
             epilog="\b\nExamples:\n  ollama-lb models\n  ollama-lb models --url http://10.0.0.7:11434 --json\n"
                    "  ollama-lb models plan my.toml")
@with_running
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def models(context: click.Context, url: str, key_env: str | None, *, as_json: bool) -> int:
    """Tell where models are, and what is under way for [[models]].

    Asks the balancer that runs at --url. Exits with 2 when it cannot be asked.
    """
    if context.invoked_subcommand is not None:
        return EXIT_OK
    import json

    try:
        told = json.loads(ask(url, "/status", "application/json", key_env))
    except (CannotAskError, UnknownError) as error:
        click.echo(str(error), err=True)
        return EXIT_CANNOT_ASK
    if as_json:
        servers = {server["name"]: server["models"] for server in told["servers"]}
        click.echo(json.dumps({"models": told["models"], "servers": servers}, ensure_ascii=False))
    else:
        from lbio.answers.lb_texts import models_text

        click.echo(models_text(told) if told["models"] else f"{models_text(told)}\n\n{NONE_DECLARED}")
    return EXIT_OK


@models.command(epilog="\b\nExample:\n  ollama-lb models plan my.toml")
@click.argument("config", metavar="CONFIG")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plan(config: str, *, as_json: bool) -> int:
    """Read the servers of CONFIG, and tell what `run` would do to bring its [[models]] to where they are to be.

    Nothing is done. Exits with 1 when no server can be read, with 2 when something is wrong with CONFIG.
    """
    from lbio.config_file import ConfigError, config_path, load

    try:
        app = load(config_path(config))
    except ConfigError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        return EXIT_CONFIG
    from lbio.subcommands.plan import read_fleet

    balancer, provision = read_fleet(app)
    told = _object(balancer, provision)
    if as_json:
        import json

        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(told)))
    return EXIT_OK if any(server.is_alive for server in balancer.fleet) else EXIT_FAILED


def _object(balancer: LoadBalancer, provision: Provision) -> dict[str, Any]:
    from lbio.subcommands.plan import all_steps

    places = {place.model: place for place in provision.places(0)}
    return {
        "models": [
            {"name": place.settings.name, "copies": place.copies, "servers": place.servers,
             "on_disk": place.on_disk, "loaded": place.loaded}
            for place in places.values()
        ],
        "steps": [
            {"work": step.work, "model": places[step.model].settings.name, "server": step.server.name,
             "why": step.why}
            for step in all_steps(provision)
        ],
        "servers": [server.name for server in balancer.fleet],
        "unread": {server.name: server.last_error for server in balancer.fleet if not server.is_alive},
    }  # fmt: skip


def _lines(told: dict[str, Any]) -> list[str]:
    from lbio.answers.status import align

    if not told["models"]:
        return [NONE_DECLARED]
    if not told["servers"]:
        return ["no [[servers]]: the fake servers of [[fleet]] are not started for this"]
    rows = [("MODEL", "COPIES", "PLACED ON", "ON DISK", "LOADED")]
    for model in told["models"]:
        there = sum(name in model["on_disk"] for name in model["servers"])
        names = (", ".join(model[key]) or "-" for key in ("servers", "on_disk", "loaded"))
        rows.append((model["name"], f"{there} of {model['copies']}", *names))
    lines = [align(rows), ""]
    lines += [f"cannot be read: {name}: {why}" for name, why in told["unread"].items()]
    for step in told["steps"]:
        lines.append(f"would {step['work']} {step['model']} on {step['server']}: {step['why']}")
    if len(told["unread"]) == len(told["servers"]):
        return [*lines, "no server could be read: what would be done cannot be told"]
    return lines if told["steps"] else [*lines, "nothing to do"]
