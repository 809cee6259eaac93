"""The tokens that some catalogues want behind an address."""

from __future__ import annotations

import datetime as dt
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mm_model.data.remote import Patience, fetch
from mm_model.data.sources.stac.request import Sign
from mm_model.errors import ServiceError

_RENEW_BEFORE_S = 60.0
_JUST_NOW_S = 1.0


@dataclass
class _Token:
    text: str
    expires_at: float
    fetched_at: float


class Signer:
    """Appends a collection's token to addresses; one is kept until shortly before it expires.

    Args:
        sign: where tokens come from; None leaves addresses as they are.
        patience: with the token's server.
    """

    def __init__(self, sign: Sign | None, patience: Patience) -> None:
        self._sign, self._patience = sign, patience
        self._tokens: dict[str, _Token] = {}
        self._one_at_a_time = threading.Lock()

    def of(self, collection: str) -> Callable[[str, bool], str]:
        """(address, whether the last signature was refused) → address to ask."""

        def signed(href: str, refused: bool) -> str:
            if self._sign is None:
                return href
            return f"{href}{'&' if '?' in href else '?'}{self._token(collection, refused)}"

        return signed

    def _token(self, collection: str, refused: bool) -> str:
        assert self._sign is not None
        with self._one_at_a_time:
            token, now = self._tokens.get(collection), time.time()
            if token is not None:
                # Another reader may just have renewed what this one was refused with.
                stale = refused and now - token.fetched_at > _JUST_NOW_S
                if not stale and now < token.expires_at - _RENEW_BEFORE_S:
                    return token.text
            self._tokens[collection] = self._fetch(self._sign, collection)
            return self._tokens[collection].text

    def _fetch(self, sign: Sign, collection: str) -> _Token:
        url = sign.token_url.replace("{collection}", collection)
        key = os.environ.get(sign.key_variable or "")
        headers = {sign.key_header: key} if key and sign.key_header else {}
        response = fetch(url, self._patience, headers)
        try:
            answer = response.json()
            expires = dt.datetime.fromisoformat(answer["msft:expiry"])
            return _Token(str(answer["token"]), expires.timestamp(), time.time())
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"{url}: token", got=repr(error), allowed='{"token": …, "msft:expiry": …}'
            ) from None
