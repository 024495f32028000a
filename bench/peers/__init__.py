"""The peers, each called as its documentation says.

An adapter's functions take the inputs of all sets and give the `Calls` to time. They import their package inside, so
that one that is not installed costs its peer's column and nothing else.
"""
