"""Process-level support: metrics, logs, threads, memory. Imports no other part of the server."""
