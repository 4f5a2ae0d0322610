"""kfp's client, but that no request waits for ever: what is asked has an answer or an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from dpo.storage.proxies import proxy_for

ANSWER_SECONDS = 20.0
_CHANGE_SECONDS = 60.0
_UPLOAD_SECONDS = 300.0
_CUT_TRIES = 3
_CUT_PAUSE_SECONDS = 0.2


class NotTheApi(Exception):
    """A page in place of an answer, as proxies show whoever is not signed in, with code 200."""

    def __init__(
        self, text: str = "it sent a page for people and no answer of Kubeflow Pipelines' API"
    ) -> None:
        super().__init__(text)


def bounded_client(**arguments: Any) -> Any:
    """A ``kfp.Client`` with a time limit on each request.

    Its own requests have none, and are sent up to four times when they have no answer. Here they
    are sent once; but a question (GET) on a connection that was cut is asked again at once. And
    what is no answer of the API raises `NotTheApi`: kfp would take a page for an empty answer.

    Args:
        arguments: Of ``kfp.Client``.
    """
    import kfp
    from kfp.client import client as module
    from urllib3.util import Retry

    # its own lines would stand among the JSON that `--output json` promises; taken from its module
    # alone, for threads of the service share one standard output
    module.print = _say_nothing

    class Client(kfp.Client):  # type: ignore[misc]
        """Without kfp's own five tries and five logged tracebacks when the endpoint refuses."""

        def _load_config(self, *given: Any) -> Any:
            config = super()._load_config(*given)
            config.retries = Retry(total=None, connect=0, read=0, redirect=3, status=0, other=0)
            # the API's client reads none from the environment
            if proxy := proxy_for(config.host):
                config.proxy, config.proxy_headers = proxy
            return config

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:  # noqa: ARG002
            # asked while the client is being made, before the limit below is set
            limit = pair(ANSWER_SECONDS)
            ask = self._healthz_api.healthz_service_get_healthz
            return _within(sum(limit), lambda: ask(_request_timeout=limit))

    client = Client(**arguments)
    rest = client._run_api.api_client.rest_client
    rest.request = _bounded(rest.request)
    return client


def _say_nothing(*_: object, **__: object) -> None:
    """In place of ``print``."""


def pair(seconds: float) -> tuple[float, float]:
    """A time limit as the API's client wants it: it passes over one that is a single float."""
    return seconds, seconds


def _bounded(send: Callable[..., Any]) -> Callable[..., Any]:
    from urllib3.exceptions import HTTPError, ProtocolError

    def request(method: str, url: str, *given: Any, **named: Any) -> Any:
        if not named.get("_request_timeout"):
            named["_request_timeout"] = pair(_limit(method, url))
        limit = named["_request_timeout"]
        whole = sum(limit) if isinstance(limit, tuple) else limit

        def answer() -> Any:
            return _answer(url, _within(whole, lambda: send(method, url, *given, **named)))

        for _ in range(_CUT_TRIES - 1 if method == "GET" else 0):
            try:
                return answer()
            except HTTPError as error:
                if not isinstance(getattr(error, "reason", error), ProtocolError):
                    raise
            time.sleep(_CUT_PAUSE_SECONDS)
        return answer()

    return request


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or raises, where that does not take longer.

    The limit of the API's client is on the time between two bytes: an answer that comes byte by
    byte would hold it for ever. What is given up here ends by itself or with the process.

    Raises:
        TimeoutError: it took longer.
    """
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"its answer was not complete after {seconds:.3g} s") from None
    if error is not None:
        raise error
    return result


def _answer(url: str, response: Any) -> Any:
    text = response.data
    start = text[:64].decode(errors="replace") if isinstance(text, bytes) else str(text)[:64]
    # the log of a pod is the one answer that is no JSON
    if start.lstrip().startswith("<") and not url.endswith("/log"):
        raise NotTheApi
    return response


def _limit(method: str, url: str) -> float:
    if "/pipelines/upload" in url:
        return _UPLOAD_SECONDS
    return ANSWER_SECONDS if method == "GET" else _CHANGE_SECONDS
