"""The table of auxiliaries that samplers find theirs in, with the loaded policies in it."""

from policies.serving.store import PolicyStore
from samplers.resources import Kind, ResourceTable


def resources_of(policies: PolicyStore) -> ResourceTable:
    """Rules and policies. Further kinds are added where their models are loaded."""
    table = ResourceTable()
    table.add("policy", Kind(policies.find, policies.missing, policies.only, policies.warnings))
    return table
