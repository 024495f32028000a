"""Benchmarks of fastpeft beside its peers: ``python -m bench SUITE``, or ``pytest bench --benchmark-only``.

A suite is a list of cases; a case prepares its inputs, checks every contender against a float64 reference, times
fastpeft and the peers in turns, and prints one row. Peers that are absent or fail stay in the row with the reason.
"""
