"""Who is there, and who holds what.

* :mod:`.protocol`: the rules, sans-IO; its docstring numbers them. :mod:`.effects`: what it asks for.
* :mod:`.membership`, :mod:`.dialing`, :mod:`.streams`, :mod:`.views`: the parts of its state, pure.
* :mod:`.driver`: sockets and timers; :mod:`.link`: one control connection for callers.
* :mod:`.discovery`: where seeds come from.
"""
