"""Where an agent keeps blocks: the arena, its slots, and who may have what. ``dram`` decides, ``arena`` is the memory.

* :mod:`p2pkv.store.base`: a block's states; the contract of eviction policies.
* :mod:`p2pkv.store.slots`: which bytes of the arena are whose.
* :mod:`p2pkv.store.lease`: who holds blocks, and until when.
* :mod:`p2pkv.store.eviction`: what goes first.
* :mod:`p2pkv.store.dram`: the four together: the DRAM tier.
* :mod:`p2pkv.store.arena`, :mod:`p2pkv.store.memory`: the shared memory itself, and how much of it this host can give;
  the only modules here that make system calls.
* :mod:`p2pkv.store.events`, :mod:`p2pkv.store.integrity`: what waits for the ownership log; whether the books agree.
"""

from __future__ import annotations
