"""What Ray Serve's proxies put before every application.

Ray finds it by the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from mm_model.serving.ahead import ProxyEnd
from mm_model.serving.front import Front


def middlewares() -> list[Middleware]:
    """Ids of requests are checked before a proxy logs them, and its own answers carry them, too.

    What a proxy holds of a body is bounded, for applications that have a `ReplicaEnd`; no other may
    stand on the same Serve.
    """
    return [Middleware(Front), Middleware(ProxyEnd)]
