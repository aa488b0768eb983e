# make test   lint, types and tests          make demo   a run on the model that ships with the package
# make lint   lint and types only            make clean  remove what make made, the environment included
# make gpu    on a machine with a CUDA device: the kernels' tests and the demo there, and docs/speed.md's figures into
#             build/gpu

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test
.PHONY: test lint demo gpu clean

BIN := .venv/bin
STAMP := .venv/.installed
# constraints.txt says which pyright; it need not ask the network for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

test: lint
	$(BIN)/pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

DEMO := --layers 1 2 3 --dictionary.width 300 --dictionary.k 8 --training.tokens 160000 --training.batch-tokens 512 \
  --pairs.count 2000 --pairs.tokens 120000 --evaluation.tokens 6144 --evaluation.adversary-steps 20

demo: $(STAMP)
	$(BIN)/qkscope run $(DEMO) --out runs/demo
	@echo "open runs/demo/report.html in a browser, or look closer: $(BIN)/qkscope serve runs/demo"

gpu: $(STAMP)
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no CUDA device")'
	mkdir -p build/gpu
	$(BIN)/pytest tests/unit/test_pattern_kl_triton.py
	$(BIN)/qkscope run $(DEMO) --out build/gpu/run --training.device cuda
	gpus="$$($(BIN)/python -c 'import torch; print(min(torch.cuda.device_count(), 3))')"; \
	  $(BIN)/torchrun --nproc-per-node "$$gpus" -m qkscope run $(DEMO) --out build/gpu/together --training.device cuda
	$(BIN)/python benchmarks/pattern_kl.py --contexts 256 1024 4096 | tee build/gpu/pattern_kl.txt
	for layers in "" --rotary; do \
	  $(BIN)/python benchmarks/evaluation_memory.py --contexts 256 1024 4096 $$layers; done \
	  | tee build/gpu/evaluation_memory.txt
	for dtype in float32 bfloat16; do for size in small batches medium wide; do \
	  $(BIN)/qkscope bench speed --size $$size --dtype $$dtype --json build/gpu/speed_$${size}_$$dtype.json \
	    | tee build/gpu/speed_$${size}_$$dtype.txt; done; done

# The stamp is the last thing written and the first thing removed, so an environment without it is one that an
# interrupted install left: it is made anew. One with it is brought up to date in place.
$(STAMP): pyproject.toml constraints.txt
	python="$$(for p in python3.11 python3; do "$$p" -c '' >/dev/null 2>&1 && { echo "$$p"; break; }; done || true)"; \
	[ -n "$$python" ] || { echo "make: no python3.11 and no python3 on PATH; install Python 3.11 or newer" >&2; exit 2; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$("$$python" -V) is too old; install Python 3.11 or newer" >&2; exit 2; }; \
	[ -e $(STAMP) ] || "$$python" -m venv --clear .venv
	rm -f $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf .venv runs/demo build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
