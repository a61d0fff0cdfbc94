"""`/v1/policies`"""

import operator
import threading
from functools import partial
from pathlib import Path

import anyio.to_thread
from fastapi import FastAPI, Request, Response

from policies.serving.checkpoint import PolicyError
from policies.serving.store import Stored, UnknownPolicyError
from server.api.errors import ForbiddenError, NotFoundError
from server.api.middleware.auth import KnownKeys
from server.api.model_names import POLICY
from server.api.schemas.bodies import read_body, show
from server.api.schemas.openapi import ADMIN_ERRORS, ERRORS, LOOKUP_ERRORS, body_of
from server.api.schemas.requests import PolicyBody
from server.api.schemas.responses import PolicyEntry, PolicyList, PolicyRemoved, WholeJson, json_response
from server.api.serving import Serving
from server.engine import RequestError


class Entries:
    """JSON descriptions of policies, each made once; long ones off the event loop.

    Args:
        base: name of the served model.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self._made: dict[str, tuple[Stored, bytes]] = {}
        self._list = b""
        self._listed: list[Stored] = []
        self._lock = threading.Lock()

    def one(self, stored: Stored) -> bytes:
        """JSON of a `PolicyEntry`."""
        known = self._made.get(stored.name)
        if known is None or known[0] is not stored:
            known = self._made[stored.name] = (stored, self._make(stored))
        return known[1]

    async def all(self, policies: list[Stored]) -> bytes:
        """JSON of a `PolicyList`."""
        if self._list and _same(self._listed, policies):
            return self._list
        return await anyio.to_thread.run_sync(self._make_list, policies)

    def _make_list(self, policies: list[Stored]) -> bytes:
        with self._lock:
            if not (self._list and _same(self._listed, policies)):
                self._made = {stored.name: (stored, self.one(stored)) for stored in policies}
                entries = b",".join(entry for _, entry in self._made.values())
                self._list = PolicyList(data=[]).model_dump_json().encode().replace(b"[]", b"[" + entries + b"]")
                self._listed = policies
            return self._list

    def _make(self, stored: Stored) -> bytes:
        entry = PolicyEntry(
            id=stored.name,
            model=f"{self._base}:{POLICY}{stored.name}",
            takes_speed=stored.card.config.takes_speed,
            action=stored.card.config.action,
            parameters=stored.parameters,
            trained_on=stored.card.trained_on.model_dump(mode="json"),
            measured=[row.model_dump(mode="json") for row in stored.card.measured],
        )
        return entry.model_dump_json().encode()


def _same(one: list[Stored], other: list[Stored]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def add_routes(app: FastAPI, serving: Serving) -> None:
    policies, base = serving.model_names.policies, serving.model_names.name
    secret = serving.settings.admin_key
    admin = None if secret is None else KnownKeys([secret.get_secret_value()])

    entries = Entries(base)

    def find(name: str) -> Stored:
        try:
            return policies.get(name)
        except UnknownPolicyError as error:
            raise NotFoundError("policy", str(error), "policy_not_found") from None

    @app.get("/v1/policies", response_model=PolicyList, responses=ERRORS, tags=["catalogue"])
    async def list_policies() -> Response:
        """List the trained policies that requests can use."""
        return WholeJson(await entries.all(policies.list()))

    @app.get("/v1/policies/{policy}", response_model=PolicyEntry, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def get_policy(policy: str) -> Response:
        """Look up one policy."""
        return WholeJson(entries.one(find(policy)))

    @app.post(
        "/v1/policies",
        response_model=PolicyEntry,
        responses=ADMIN_ERRORS,
        openapi_extra=body_of(PolicyBody),
        tags=["administration"],
    )
    async def load(request: Request) -> Response:
        """Load a policy from the server's folder, in the place of one of the same name. Needs the admin key."""
        _check_admin(request, admin)
        body = await read_body(serving.threads, serving.owners.of(request), request, PolicyBody)
        within, folder = _below(serving.settings.policy_dir, body.path or body.name)
        try:
            stored = await anyio.to_thread.run_sync(partial(policies.load, body.name, folder, within))
        except PolicyError as error:
            serving.metrics.policy_load_failed()
            field = "name" if "is no name for a policy" in str(error) else "path"
            # Name the folder as the client did, shortened: its location is not for clients.
            message = str(error).replace(str(folder), show(body.path or body.name))
            raise RequestError(field, message, "invalid_policy") from None
        serving.metrics.policies(len(policies.list()))
        return WholeJson(entries.one(stored))

    @app.delete("/v1/policies/{policy}", response_model=PolicyRemoved, responses=ADMIN_ERRORS, tags=["administration"])
    async def remove(request: Request, policy: str) -> Response:
        """Take a policy out of service; what runs by it goes on. Needs the admin key."""
        _check_admin(request, admin)
        find(policy)
        removed = policies.remove(policy).name
        serving.metrics.policies(len(policies.list()))
        return json_response(PolicyRemoved(id=removed))


def _check_admin(request: Request, admin: KnownKeys | None) -> None:
    if admin is None:
        raise ForbiddenError("policies cannot be changed over HTTP: the server was started without --admin-key")
    if not admin.fit(request.headers):
        raise ForbiddenError("this needs the admin key: send it as 'Authorization: Bearer KEY'")


def _below(root: str | None, path: str) -> tuple[Path, Path]:
    """The policies folder, and the path below it. Loading checks that the path stays inside."""
    if root is None:
        raise RequestError("path", "the server was started without --policy-dir, so there is nothing to load from")
    if "\0" in path:
        raise RequestError("path", "path holds a null character", "invalid_policy")
    return Path(root), Path(root) / path
