"""Large language models over unequal machines: decoders in shards, their key-value caches, and text.

Pure (no torch): config, families, recipes. With torch: weights, rope, kv, decoder. `executors/` runs a shard.
"""
