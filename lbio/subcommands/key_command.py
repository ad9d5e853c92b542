"""`ollama-lb key …`: makes keys for clients. Only click is imported up here, as in `lbio.cli`."""

from __future__ import annotations

import click

# ruff: noqa: PLC0415  # `--help` must not wait for what it does not need


@click.group(epilog="\b\nExample:\n  ollama-lb key new alice >> my.toml")
def key() -> None:
    """Make keys for clients."""


@key.command(epilog="\b\nExamples:\n  ollama-lb key new alice >> my.toml\n"
                    "  ollama-lb key new bob --models llama3.2 --models 'qwen3:*' --requests-per-minute 60\n"
                    "  ollama-lb key new admin --allow use --allow manage")
@click.argument("name")
@click.option("--models", multiple=True, metavar="MODEL",
              help="Only these; repeatable. * stands for any text, a name without a tag means :latest. [default: *]")
@click.option("--allow", multiple=True, type=click.Choice(["use", "manage"]),
              help="What it is for; repeatable. manage: pull, push, create, copy, delete, blobs, and the management "
                   "endpoints. [default: use]")
@click.option("--requests-per-minute", type=click.IntRange(1, 1_000_000), metavar="N", help="No more than this.")
def new(name: str, models: tuple[str, ...], allow: tuple[str, ...], requests_per_minute: int | None) -> int:
    """Make a key for NAME.

    The key is shown once, on standard error, and is kept nowhere. What belongs into the configuration goes to standard
    output: a hash, of which nobody can find the key.
    """
    from lbcore.parsing import Problem
    from lbio.access.keys import new_hash, new_token
    from lbio.configuration.config_keys import parse_keys
    from lbio.configuration.config_text import dump_key

    token = new_token()
    said = {"models": [part for text in models for part in text.split(",")], "allow": list(dict.fromkeys(allow)),
            "requests_per_minute": requests_per_minute}
    problems: list[Problem] = []
    made = parse_keys([{"name": name, "hash": new_hash(token), **{word: it for word, it in said.items() if it}}],
                      problems, (), None)
    if problems:
        for problem in problems:
            click.echo(str(problem).replace("keys[0].", ""), err=True)
        return 2
    click.echo(f"the key of {name}, shown only now:\n\n  {token}\n", err=True)
    click.echo(dump_key(made[0]), nl=False)
    return 0
