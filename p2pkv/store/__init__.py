"""Where an agent keeps blocks: the arena, its slots, and who may have what. ``dram`` decides, ``arena`` is the memory.

* :mod:`p2pkv.store.base`: a block's states; the contract of eviction policies.
* :mod:`p2pkv.store.slots`: which bytes of the arena are whose.
* :mod:`p2pkv.store.lease`: who holds blocks, and until when.
* :mod:`p2pkv.store.eviction`: what goes first.
* :mod:`p2pkv.store.dram`: the four together: the DRAM tier.
* :mod:`p2pkv.store.arena`: the shared memory itself; the only module here that makes system calls.
"""

from __future__ import annotations
