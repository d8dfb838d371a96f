"""p2pkv: peer-to-peer KV-cache sharing between LLM replicas.

Importing this package imports nothing else: engines import :mod:`p2pkv.client`, operators run the ``p2pkv`` command.
"""

__version__ = "0.1.0"
