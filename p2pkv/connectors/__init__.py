"""Connectors: where inference engines plug in. Each module imports its own engine and the client, never the agent.

Importing this package imports no engine; import the module of the engine you run (``p2pkv.connectors.vllm``).
"""
