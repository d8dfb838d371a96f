"""Bytes between nodes: one contract (:mod:`.base`), an implementation per file."""
