"""Words on the wire: framing (:mod:`.frame`), between agents (:mod:`.peer`), between engine and agent (:mod:`.engine`).

Sans-IO. The byte layout is described in ``docs/protocol.md``. Engines import :mod:`.frame`, :mod:`.limits` and
:mod:`.engine_types`, which therefore import no msgspec; the rest is the agent's.
"""
