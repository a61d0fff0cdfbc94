"""The process: metrics, logs, threads, memory. Imports nothing else of the server."""
