"""Policies that choose among resident plans while links change: the controller, and those it is measured against."""

from ecotone.policies.box import NAMES, Contender, contender, statics

__all__ = ["NAMES", "Contender", "contender", "statics"]
