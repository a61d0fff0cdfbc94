"""Sockets, connections and the life of the server's process."""
