"""A small cluster on one machine: agents, real vLLM replicas, one prefix; used by ``p2pkv demo`` and the end-to-end tests."""
