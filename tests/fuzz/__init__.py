"""Random requests to every family, and what must hold of the answers whatever was asked.

Written from outside: nothing here looks into samplers, loop or engine. `python -m tests.fuzz --help`.
"""
