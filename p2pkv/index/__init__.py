"""Who holds which block: hashes, the prefix index (C++ core and Python oracle), and the owners' logs that feed it.

Pure: no sockets, clocks, threads of its own or randomness that could change an answer.

* :mod:`.hashing`: tokens -> an engine's block hashes; block hashes -> index keys; set checksums.
* :mod:`.prefix`: :class:`~p2pkv.index.prefix.PrefixIndex`, the typed face of the C++ core.
* :mod:`.reference`: the same interface, slow and obviously right.
* :mod:`.ownership`: one owner's log of changes, and what a reader keeps of it.

Importing this package imports none of them.
"""
