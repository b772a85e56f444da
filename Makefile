# Each target makes its own environment: .venv, with torch from a CPU wheel first where one is at hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0

.PHONY: quickstart test test-pythons conformance fuzz slow gpu style quality docs bench clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

# The main job: pretrain a tiny backbone (cached), train a LoRAMoE adapter on it, save, reload and compare.
quickstart: $(STAMP)
	$(BIN)/python train/make_backbone.py
	$(BIN)/accelerate launch train/sft.py --config configs/runs/quickstart.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Other releases of Python, each in an environment of its own where torch has a CPU build for it.
test-pythons: $(STAMP)
	$(BIN)/python tests/pythons/run.py

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

# peft's own test files, fetched from its source distribution, with our adapter types.
conformance: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m conformance tests/conformance

# Random lives of adapters and random configurations; FUZZ_LIVES=20000 FUZZ_CASES=20000 makes it longer,
# and FUZZ_FROM=2020 begins with another life.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m fuzz tests/fuzz

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The documentation as a site in .cache/site, with every link checked; `.venv/bin/mkdocs serve` shows it while you write.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 16 256 --layers 4 --output benchmarks/results/train_step.json
	$(BIN)/python benchmarks/train_step.py --dtypes bfloat16 --tokens 16 --rounds 9 --output benchmarks/results/train_step_bfloat16.json
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 2048 --layers 1 \
		--output benchmarks/results/train_step_2048.json
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 256 --layers 1 --experts 32 --all-linear --slow \
		--telemetry --rounds 5 --output benchmarks/results/train_step_32_experts.json
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 2048 --layers 1 --slow --rounds 5 \
		--only LoRAMoE 'top-2, balance and z-loss' SiRA MoLORA --output benchmarks/results/train_step_loop.json
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 16 --hidden 64 --layers 32 --telemetry \
		--only 'top-2, balance and z-loss' --output benchmarks/results/telemetry.json
	$(BIN)/python benchmarks/train_step.py --dtypes float32 --tokens 256 --layers 1 --compiled \
		--only LoRAMoE 'top-2, balance and z-loss' SiRA MoLORA --output benchmarks/results/train_step_compiled.json
	$(BIN)/python benchmarks/moe_block.py --output benchmarks/results/moe_block.json
	$(BIN)/python benchmarks/decode.py --output benchmarks/results/decode.json
	$(BIN)/python benchmarks/expert_lora.py --dtypes float32 --experts 64 --output benchmarks/results/expert_lora.json
	$(BIN)/python benchmarks/expert_lora.py --dtypes bfloat16 --experts 64 --rounds 7 \
		--output benchmarks/results/expert_lora_bfloat16.json
	$(BIN)/python benchmarks/expert_lora.py --dtypes float32 --experts 8 --rounds 9 --no-memory \
		--output benchmarks/results/expert_lora_8_experts.json
	$(BIN)/python benchmarks/routed_sum.py --tokens 1 --output benchmarks/results/routed_sum_1.json
	$(BIN)/python benchmarks/routed_sum.py --tokens 256 --output benchmarks/results/routed_sum_256.json
	$(BIN)/python benchmarks/routed_sum.py --tokens 2048 --output benchmarks/results/routed_sum_2048.json
	$(BIN)/python benchmarks/routed_sum.py --dtype bfloat16 --tokens 1 \
		--output benchmarks/results/routed_sum_1_bfloat16.json
	$(BIN)/python benchmarks/routed_sum.py --dtype bfloat16 --tokens 256 \
		--output benchmarks/results/routed_sum_256_bfloat16.json
	$(BIN)/python benchmarks/growth.py --output benchmarks/results/growth.json --plot docs/growth.svg
	$(BIN)/python benchmarks/catalogue.py --output benchmarks/results/catalogue.json
	$(BIN)/python benchmarks/promises.py --output benchmarks/results/promises.json
	$(BIN)/python benchmarks/tools.py --output benchmarks/results/tools.json --plot docs/tools.svg
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf $(VENV) $(VENV)-3.* .cache outputs
