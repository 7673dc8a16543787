"""Executors run one shard of a decoder fast on one device; one file each behind `executor.ShardFactory`."""
