# Every target sets up what it needs: a fresh clone needs no step before it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# An index that torch alone is taken from, before everything else comes from PyPI. Empty: PyPI's torch, which carries CUDA on Linux (gigabytes).
# The index of torch's CPU build stands in deploy/docker/Dockerfile.cpu.
TORCH_INDEX ?=

.PHONY: lane-monitoring lane-browser lane-paddleocr lane-openclip setup demo test check lint types slow bench bench-control bench-scale curves compare-objectives monitoring cluster chaos clean

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)"
endif
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ocr,dev]"
	touch $@

demo: setup  ## train the shipped model on a laptop: base evaluation, RL, evaluation, report
	$(VENV)/bin/flowfleet demo

test: setup  ## the whole suite that CI runs: no GPU, no network, < 15 minutes on 2 cores
	$(PY) -m pytest

slow: setup  ## the heavier tests
	$(PY) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

check: lint types test  ## lint + types + tests

bench: setup  ## speed and memory per stage, written to docs/benchmarks
	$(PY) -m deploy.bench --model models/tiny-sd3 --out docs/benchmarks

bench-control: setup  ## the control plane under 64 fake workers, 1,000 updates, about 20 minutes; written to docs/benchmarks
	$(PY) -m deploy.bench_control --out docs/benchmarks

bench-scale: setup  ## images a second while workers come and go, fake engines and real ones; written to docs/benchmarks
	$(PY) -m deploy.bench_scale --engines fake --sizes 1,4,2 --updates 20
	$(PY) -m deploy.bench_scale --engines real --sizes 1,2,1 --updates 6

curves: setup  ## the curves of docs/results/curves.svg, over 3 hours on 2 cores; resumable, a raw file a run under docs/results; one that exists is not run again
	$(PY) -m deploy.results run tiny-geneval --seeds 1,2,3 --minutes 45
	$(PY) -m deploy.results run tiny-ocr --seeds 1,2,3 --minutes 12
	$(PY) -m deploy.results run tiny-geneval-grpo --seeds 1 --minutes 25
	$(PY) -m deploy.results draw

compare-objectives: setup  ## every objective on tiny-geneval: about 7 hours on 2 cores; resumable, a raw file a run, then table and plot
	$(PY) -m deploy.objective_runs run
	$(PY) -m deploy.objective_runs draw

monitoring: setup  ## dashboards, alert rules and docs/metrics.md, written anew from deploy/monitoring
	$(PY) -m deploy.monitoring.build
	$(PY) -m deploy.monitoring.alerts
	$(PY) -m tests.alert_cases
	$(PY) -m deploy.monitoring.metric_page

cluster: setup  ## three Ray nodes on this machine behind a token, and tiny-geneval submitted to them for three minutes
	$(PY) -m deploy.local_cluster tiny-geneval --minutes 3

chaos: setup  ## kill -9 thirty random processes of a real run, audit it, compare it bit by bit with one that nobody touched
	rm -rf runs/chaos
	$(PY) -m deploy.chaos --kills 30 --seed 1

PROMETHEUS := build/prometheus/usr/bin/prometheus

$(PROMETHEUS):
	mkdir -p build/prometheus
	cd build/prometheus && apt-get download prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb

lane-monitoring: setup $(PROMETHEUS)  ## dashboards, alerts and metrics against Debian's Prometheus and promtool, fetched without root
	$(PY) -m pytest -m prometheus

lane-browser: setup  ## pages in a headless Chromium
	$(PY) -m pytest -m browser

LANE := -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider

lane-paddleocr:  ## PaddleOCR's own class, in an environment of its own, offline once built
	test -x build/paddleocr/bin/python || $(PYTHON) -m venv build/paddleocr
	build/paddleocr/bin/pip install --quiet --disable-pip-version-check "paddleocr>=3.7" onnxruntime pytest rapidfuzz
	build/paddleocr/bin/pip install --quiet --disable-pip-version-check --no-deps rapidocr
	build/paddleocr/bin/python $(LANE) tests/lane_paddleocr.py

lane-openclip:  ## open_clip's own classes, in an environment of its own, offline once built
	test -x build/openclip/bin/python || $(PYTHON) -m venv build/openclip
	build/openclip/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest
	build/openclip/bin/pip install --quiet --disable-pip-version-check --no-deps open_clip_torch torchvision timm ftfy wcwidth
	build/openclip/bin/python $(LANE) tests/lane_openclip.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
