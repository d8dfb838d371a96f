"""Words on the wire: framing (:mod:`.frame`), between agents (:mod:`.peer`), between engine and agent (:mod:`.engine`).

Sans-IO. The byte layout is described in ``docs/protocol.md``.
"""
