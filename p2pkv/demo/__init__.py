"""A small cluster on one machine: agents, real vLLM replicas; for ``p2pkv demo`` and end-to-end tests."""
