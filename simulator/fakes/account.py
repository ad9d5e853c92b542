"""What a server without a way to ollama.com answers about accounts and the web (captures: me, experimental). Pure."""

from collections.abc import Mapping

from simulator.fake_ollama import FakeOllama
from simulator.fakes.answers import go_json
from simulator.fakes.bodies import ApiError
from simulator.fakes.replies import JSON_CHARSET, Handler, Moment, Reply, Request
from simulator.fakes.specs import NS_PER_S

_WEB = "/api/experimental/"
_KEYS = "/api/user/keys/"


def _status(_fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return Reply(200, JSON_CHARSET, go_json({"cloud": {"disabled": False, "source": "none"}}))


def _me(_fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    raise ApiError(503, "account unavailable")


def _signout(_fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    raise ApiError(500, "there was an error signing out")


def _web(_fake: FakeOllama, request: Request, moment: Moment) -> Reply:
    if not request.body.strip():
        raise ApiError(400, "missing request body")
    what = request.path.removeprefix(_WEB)
    url = f"https://ollama.com:443/api/{what}?ts={moment.wall_ns // NS_PER_S}"
    raise ApiError(502, f'Post "{url}": dial tcp: lookup ollama.com on 127.0.0.1:53: no such host')


def _recommended(_fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return Reply(200, JSON_CHARSET, go_json({"recommendations": []}))


ACCOUNT: Mapping[str, Mapping[str, Handler]] = {
    "/api/status": {"GET": _status},
    "/api/me": {"POST": _me},
    "/api/signout": {"POST": _signout},
    f"{_WEB}web_search": {"POST": _web},
    f"{_WEB}web_fetch": {"POST": _web},
    f"{_WEB}model-recommendations": {"GET": _recommended},
}
"""The paths, and their methods."""

KEY: Mapping[str, Handler] = {"DELETE": _signout}
"""The methods of a key of an account."""


def is_key(path: str) -> bool:
    """Tell whether a path is that of a key of an account."""
    return path.startswith(_KEYS) and path != _KEYS and "/" not in path.removeprefix(_KEYS)
