"""Ecotone: one PyTorch model over many unequal machines."""
