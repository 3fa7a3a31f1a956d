"""What went wrong with the hub, in words for the person who asked."""

from blyan_node.hub.messages import Get, Look, Request
from blyan_node.hub.transfer import CutOff, NotWhatItSaid
from protocols.errors import ErrorCode, Refused
from storage.errors import FULL, DiskFull

_PASSING = (408, 425, 429, 500, 502, 503, 504)
_TOKEN = "If it is private or gated, start the node with a token of yours in HF_TOKEN."


def require_token(token: str) -> None:
    """Raises `Refused` for what cannot go into a header: the libraries would quote it whole."""
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            "nothing was asked of the hub",
            "what HF_TOKEN has is no token: it has spaces, several lines or other letters",
            "Start the node with a token as the hub shows it, or without HF_TOKEN.",
            {"variable": "HF_TOKEN"},
        )


def is_passing(error: Exception) -> bool:
    """Whether the same request may go better a moment later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    return not isinstance(error, OSError | ValueError | NotWhatItSaid | AssertionError)


def explained(error: Exception, request: Request) -> Refused:
    """The refusal that an exception of the library, or of ours, means."""
    what = "nothing was published: "
    data: dict[str, object] = {"error": type(error).__name__}
    if isinstance(request, Look):
        what += f"hf:{request.repository}@{request.revision} cannot be had"
        data["source"] = f"hf:{request.repository}@{request.revision}"
    elif isinstance(request, Get):
        what += f"{request.name} could not be downloaded"
        data["file"] = request.name
    kind, said, status = type(error).__name__, _said(error), _status(error)
    if kind == "GatedRepoError":
        return Refused(
            ErrorCode.NOT_ALLOWED, what, "its owner lets nobody in unasked", _TOKEN, data
        )
    if kind == "RepositoryNotFoundError":
        return Refused(ErrorCode.NOT_FOUND, what, "the hub knows no such model", _TOKEN, data)
    if kind == "RevisionNotFoundError":
        why, following = "the model has no such revision", "Name a branch, a tag or a commit of it."
        return Refused(ErrorCode.NOT_FOUND, what, why, following, data)
    if kind == "HFValidationError":
        return Refused(ErrorCode.BAD_INPUT, what, said, "", data)
    if isinstance(error, NotWhatItSaid):
        following = "Try again; if it stays so, the hub or what is in between is not to be trusted."
        return Refused(ErrorCode.HUB_FAILED, what, str(error), following, data)
    if isinstance(error, OSError) and error.errno in FULL:
        return DiskFull(said, what, **data)
    following = "What came is kept: try again later, or look at `hub_endpoint` in config.toml."
    if status is not None:
        why = f"the hub answers with status {status}"
    elif isinstance(error, CutOff):
        why = f"{error}, again and again"
    elif "Timeout" in kind:
        return Refused(ErrorCode.TIMEOUT, what, "the hub does not answer", following, data)
    elif "ConnectError" in kind:
        why = f"the hub cannot be reached ({said})"
    else:
        why = f"the hub's answer cannot be used ({said})"
    return Refused(ErrorCode.HUB_FAILED, what, why, following, data)


def _status(error: Exception) -> int | None:
    """The status of the answer that an exception of the library is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _said(error: Exception) -> str:
    """Its kind and the first line of its words, safe to show in a terminal."""
    line = next(iter(str(error).splitlines()), "")
    text = f"{type(error).__name__}: {line}"[:200].encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)
