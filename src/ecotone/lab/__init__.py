"""Emulated machines on one Linux computer, from the cluster file that drives simulator and real machines (docs/lab.md).

Namespaces, rates by the kernel, delay and loss by netem or a relay of our own, CPU and memory by control groups, and real
nodes inside; without root, processes with shaped wires. It decides nothing about plans and knows nothing of models.
"""

from ecotone.lab.abilities import Abilities, abilities
from ecotone.lab.commands import LabError
from ecotone.lab.laboratory import Laboratory

__all__ = ["Abilities", "LabError", "Laboratory", "abilities"]
