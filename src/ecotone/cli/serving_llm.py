"""`ecotone serve MODEL` where MODEL is a language model: measured, planned over the cluster, behind an OpenAI-compatible server."""
