# Two commands do everything on a fresh machine: `make demo` and `make test`. No root, no GPU, only a Python package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= report
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ecotone needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@start=$$(date +%s); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fast,hub,llm,video,report,learn,test,lint,bench]' && \
	  echo "installation took $$(( $$(date +%s) - start )) s"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ecotone demo --out $(OUT)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)
	@mkdir -p results
	@for name in planner joint_planner executors codec wire sim_vs_run split_latency \
	  fault_simulation failover switching dynamic_split edge_prune dag_oracle accuracy_table exits bottleneck \
	  dyno users sac_d mahppo llm_exact llm_planner llm_twin llm_serving llm_wan llm_failover llm_decode llm_drafters \
	  generation_faults speculation_simulated openai_server soak; do \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --json results/$$name.json || exit 1; done
	$(BIN)/python -m benchmarks.figures_table
	$(BIN)/python -m benchmarks.gallery

clean:
	rm -rf $(VENV) build dist report results
