"""`ecotone serve MODEL` where MODEL is a language model: measured, planned over the cluster, served as OpenAI's API is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ecotone.cli import options
from ecotone.cli.console import err, out, progress_bar
from ecotone.cli.planning_llm import LlmWork, load_llm, plan_table_llm, solve_llm
from ecotone.cli.workflow import read_file
from ecotone.cluster import DeviceId
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Drafter, PromptLookup
from ecotone.decoding.window import AdaptivePolicy
from ecotone.llm.answers import AnswerText
from ecotone.llm.backend import LlmBackend
from ecotone.llm.deploy import deploy_llm, join
from ecotone.llm.drafters import Chain, model_drafter
from ecotone.llm.generator import Generator
from ecotone.llm.grammar import Grammars
from ecotone.llm.service import GenerationService
from ecotone.llm.steward import Offer, Steward
from ecotone.llm.weights import Checkpoint, find_model
from ecotone.llmplan import LlmPlan
from ecotone.runtime import Nodes
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.run import serve as serve_http
from ecotone.units import EcotoneError

__all__ = ["serve_llm"]
