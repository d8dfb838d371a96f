"""Who is there, and who holds what: docs/algorithm.md.

* ``core/`` (C++, :mod:`._gossip`): the rules, sans-IO; ``core/gossip.hpp`` numbers them. ``simulator/``: a cell.
* :mod:`.driver`: timers and keys around the core; :mod:`.datagrams`: frames over UDP; :mod:`.control`: letters and
  requests over TCP, with :mod:`.connection`, :mod:`.link`, :mod:`.requests`; :mod:`.tls`.
* :mod:`.keyring`, :mod:`.keyfile`, :mod:`.sealed`, :mod:`.tickets`: the cell's key, and what is proven with it.
* :mod:`.views`: what is shown of a peer; :mod:`.observer`: a member without blocks; :mod:`.discovery`: seeds.
"""
