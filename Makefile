# make setup   a virtual environment in .venv with everything
# make demo    train, sample, score and look into ProMoE on real digits: 2 processes, experts sharded over both, ZeRO-2
# make bench-gpu   is it right, how fast, how much memory: one GPU, 560 s, no network; figures into OUT, run again to go
#                  on; DRY=1: tiny models, CPU. Any Python with torch, numpy, pyyaml, safetensors: VENV=, or PYTHON=
# make bench-gpu-train DATA=cifar10_jpeg.npz   then ProMoE-S and Dense-S on CIFAR-10, EACH=75 seconds each
# make test    all tests, side by side; lint is separate: make lint
# make test-fast   those that neither start processes nor train or compile for long
# make test-slurm   the batch scripts on a real Slurm of two emulated nodes; needs root and Debian's Slurm
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/digits
BIN := $(VENV)/bin
# Three, also on two cores: tests that start jobs often wait for them, and fast ones do not. By file: pytest 9.2 no longer
# reads the attribute in which xdist 3.8.0 notes groups, so that --dist loadgroup puts every test anywhere, and each
# process makes its fixtures
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder --numprocesses
export DS_BUILD_OPS = 0
# Some containers set it; the hundreds of processes of the tests would each compile what they import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-fast test-slurm bench-gpu bench-gpu-train lint clean
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
	$(BIN)/python launchers/analyze.py --run $(RUN)
	@echo "pictures: $(RUN)/samples/experts.png (samples and their experts), $(RUN)/samples/cfg1.0/grid.png"
	@echo "what the experts learned: $(RUN)/analysis/report.html"

test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) 3

test-fast: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) logical -m "not slow and not slurm"

test-slurm: setup
	$(BIN)/python -m pytest -m slurm -s tests/slurm

# the environment's Python, or the machine's own
BENCH_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
DRY_RUN = $(if $(filter-out 0,$(DRY)),--dry)

bench-gpu:
	@$(BENCH_PYTHON) -m benchmarks.gpu $(DRY_RUN) $(if $(OUT),--out "$(OUT)")

bench-gpu-train:
	@$(BENCH_PYTHON) -m benchmarks.gpu.cifar $(DRY_RUN) $(if $(OUT),--out "$(OUT)") $(if $(DATA),--data "$(DATA)") \
		$(if $(EACH),--each $(EACH)) $(if $(COMPILE),--compile)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x slurm/*.sh slurm/*.sbatch tests/slurm/*.sh findings/*.sh

clean:
	rm -rf $(VENV) runs
