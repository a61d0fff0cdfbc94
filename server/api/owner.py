"""Owner of a request, by whom shares of the server are counted."""

import hashlib
import hmac
import ipaddress
import secrets

from starlette.requests import HTTPConnection

from server.api.middleware.auth import bearer_key
from server.engine import Owner
from server.settings import Settings

IPV6_PREFIX = 64
"""Bits of an IPv6 address that identify a client's network; the client can choose the rest."""


class Owners:
    """Identifies the owner of a request: by key, or by connection and address if the server has no keys.

    Keys are identified by digests with a new random salt in each process, which reveal nothing about them.
    """

    def __init__(self, settings: Settings) -> None:
        self._keyed = bool(settings.api_key)
        self._salt = secrets.token_bytes(16)
        admin = settings.admin_key
        self._admin = None if admin is None else self._digest(admin.get_secret_value().encode())

    def of(self, request: HTTPConnection) -> Owner:
        """Owner of a request. If the server has keys, the request's key must be valid."""
        key = bearer_key(request.headers)
        digest = self._digest(key or b"")
        if self._admin is not None and key is not None and hmac.compare_digest(digest, self._admin):
            return Owner(digest, digest, ahead=True)
        if self._keyed:
            return Owner(digest, digest)
        if request.client is None:
            return Owner()
        return Owner(f"{request.client.host} {request.client.port}", network(request.client.host))

    def _digest(self, key: bytes) -> str:
        return hashlib.blake2b(key, key=self._salt, digest_size=16).hexdigest()


def network(host: str) -> str:
    """Part of an address that a client cannot choose."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
    return str(address)
