"""Where an agent keeps blocks: the arena, its slots, and who may have what. ``dram`` decides, ``arena`` is the memory.

* :mod:`p2pkv.store.base`: a block's states, and the other words of the store.
* :mod:`p2pkv.store.dram`: the DRAM tier, for the agent's loop: a thin layer over the C++ books in ``core/``, which I/O
  threads use directly.
* :mod:`p2pkv.store.reference`: the same books in Python, the oracle of the core. Its parts:
  :mod:`p2pkv.store.slots` (which bytes of the arena are whose), :mod:`p2pkv.store.lease` (who holds blocks, and until
  when), :mod:`p2pkv.store.eviction` (what goes first), :mod:`p2pkv.store.events` (what waits for the ownership log),
  :mod:`p2pkv.store.integrity` (whether the books agree).
* :mod:`p2pkv.store.arena`, :mod:`p2pkv.store.memory`: the shared memory itself, and how much of it this host can give;
  the only modules here that make system calls. (The core draws lease ids from the kernel, never under its mutex.)
"""

from __future__ import annotations
