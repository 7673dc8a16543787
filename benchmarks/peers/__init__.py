"""Engines that run one language model over several machines, each behind the one interface of peer.py."""
