"""TLS towards `https://` servers."""

from __future__ import annotations

import ssl

from lbcore.config import ServerSettings


def check_ca_file(path: str) -> None:
    """Raise OSError (ssl.SSLError: it has no certificate in it) for a file whose authorities cannot be used."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)


def client_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """Return how the server's certificate is checked; None for `http://`. Raises OSError for an unusable ca_file."""
    if not settings.url.startswith("https://"):
        return None
    context = ssl.create_default_context(cafile=settings.ca_file or None)
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
