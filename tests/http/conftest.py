"""The servers of the API's tests, whose connections are under test here."""

from tests.api.conftest import _close_models, _plain_logs, server

__all__ = ["_close_models", "_plain_logs", "server"]
