"""Whether the Hugging Face Hub can be reached.

Knows a name and a socket. Invariant: asking costs one name look-up, where the Hub's client would retry for half a
minute per file on a machine without a network.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

from huggingface_hub import constants


def hub_reachable() -> bool:
    """False in offline mode, and where the Hub's name does not resolve and no proxy could resolve it."""
    if constants.is_offline_mode():
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
