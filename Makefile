# make setup   a virtual environment in .venv with everything
# make demo    train, sample and score ProMoE on real digits: 2 processes, experts sharded over both, ZeRO-2
# make bench-gpu   the speed table on one GPU in 8 minutes, no network; run again to go on
# make test    lint is separate: make lint
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/digits
BIN := $(VENV)/bin
export DS_BUILD_OPS = 0

.PHONY: setup demo test bench-gpu lint clean
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/deepspeed --quiet --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json --run $(RUN) parallel.expert_parallel=2
	$(BIN)/torchrun --nproc-per-node 2 -- launchers/sample.py --run $(RUN) --num 1000 --cfg 1.0,2.0 --steps 50 --out $(RUN)/samples
	$(BIN)/python launchers/evaluate.py --run $(RUN)
	@echo "pictures: $(RUN)/samples/grid.png (first classes, while training), $(RUN)/samples/cfg1.0/grid.png"

test: setup
	$(BIN)/python -m pytest

bench-gpu:
	@$(BIN)/python -c 'import torch, sys; torch.cuda.is_available() or sys.exit("make bench-gpu needs a CUDA GPU")'
	$(BIN)/python benchmarks/throughput.py --minutes 7

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs
