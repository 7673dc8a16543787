"""A node process of a launcher (runtime/node_main.py) that offers language models as well."""

from __future__ import annotations

import sys

from ecotone.llm.service import GenerationService
from ecotone.runtime.node_main import main

if __name__ == "__main__":
    sys.exit(main((GenerationService,)))
