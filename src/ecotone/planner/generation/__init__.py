"""Plans for language models: which device runs which layers, for prompts and for decoding. `choose_plan` is the verb."""

from ecotone.planner.generation import baselines
from ecotone.planner.generation.asked import OBJECTIVES, Asked, value_of
from ecotone.planner.generation.solve import LlmSolution, choose_plan, replan_without

__all__ = ["OBJECTIVES", "Asked", "LlmSolution", "baselines", "choose_plan", "replan_without", "value_of"]
