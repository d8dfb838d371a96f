"""The daemon: composes index, gossip, store and transports, and serves engines, peers and people."""
