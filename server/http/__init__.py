"""Sockets, connections and the lifecycle of the server process."""
