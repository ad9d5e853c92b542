"""`ollama-lb why ID`: asks a running balancer why a request went where it went. Only click is imported up here."""

from __future__ import annotations

import click

from lbio.subcommands.ask_running import (
    EXIT_CANNOT_ASK,
    EXIT_NOT_FOUND,
    EXIT_OK,
    CannotAskError,
    UnknownError,
    ask,
    with_running,
)


@click.command(epilog="\b\nExamples:\n  ollama-lb why 3f2a-17\n"
                      "  ollama-lb why 3f2a-17 --url http://10.0.0.7:11434 --key-env ADMIN_KEY")
@click.argument("request_id", metavar="ID")
@with_running
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def why(request_id: str, url: str, key_env: str | None, *, as_json: bool) -> int:
    """Tell why a request went where it went.

    ID is what its answer has in the header X-Ollama-LB-Request-Id, and what the log calls it: 3f2a-17, or 17. A running
    balancer knows at least its last 1,000 requests. Shown are the servers at each choice, with all that spoke for and
    against each, and every step from the arrival to the end. Exits with 1 when the request is not known, with 2 when
    nobody could be asked.
    """
    from urllib.parse import quote  # noqa: PLC0415  # `--help` must not wait for it

    accept = "application/json" if as_json else "text/plain"
    try:
        body = ask(url, f"/explain/{quote(request_id.removeprefix('#'), safe='')}", accept, key_env)
    except (CannotAskError, UnknownError) as error:
        click.echo(str(error), err=True)
        return EXIT_NOT_FOUND if isinstance(error, UnknownError) else EXIT_CANNOT_ASK
    click.echo(body.decode(errors="replace").rstrip("\n"))
    return EXIT_OK
