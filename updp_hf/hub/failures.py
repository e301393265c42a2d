"""What goes wrong on the way to the Hub, in one sentence each."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from updp_hf.errors import HubError

__all__ = ["explained", "status_of"]


@contextmanager
def explained(repo_id: str, safe: str) -> Iterator[None]:
    """Raise as `HubError` what fails within; `safe` says that nothing is lost."""
    try:
        yield
    except (HfHubHTTPError, httpx.TransportError, OSError, RuntimeError, json.JSONDecodeError) as error:
        # The client wraps what happens while it uploads weights, and parses some answers before it checks them.
        cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
        raise HubError(f"{_reason(cause, repo_id)} {safe}: push it again then.") from error


def status_of(error: Exception) -> int | None:
    """Return the status of the answer that `error` is about, None if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _reason(error: Exception, repo_id: str) -> str:
    """Return what happened and what to do, as a sentence."""
    status = status_of(error)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "The Hub does not accept the token, or there is none (401): run `hf auth login`, or pass `token`."
    if status == 403:
        return f"The token may not write to {repo_id} (403): use one with write permission, or a repository of yours."
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return f"The Hub knows no {repo_id} (404), or the token may not see it: check user, name and revision."
    if status == 412:
        return f"Others keep pushing to {repo_id} (412): wait until they have finished."
    if status == 429:
        return "The Hub takes no more requests for now (429): wait some minutes."
    if status is not None and status >= 500:
        return f"The Hub has a problem ({status}): wait some minutes."
    if status is None and isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"A file could not be read or written ({error}): make room, or give permission."
    if status is None:
        return f"The connection to the Hub broke or was not made ({type(error).__name__}): check the network."
    reason = str(error).strip().splitlines()
    return f"The Hub did not accept the push to {repo_id} ({status}: {reason[-1] if reason else 'no reason given'})."
