"""The program's entry: `ollama-lb`, and `python -m lbio`. Nothing is imported before it is known what Ctrl-C does."""

import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C ends it without a trace, also while it is being loaded."""
    try:
        from lbio.cli import main as run  # noqa: PLC0415

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
