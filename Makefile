# `make help` lists the targets.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PRESET ?= quick
# an earlier run brings all of its parameters; a preset that somebody names beside it is refused
RUN_PRESET = $(if $(filter --from --from=%,$(ARGS)),$(if $(filter command line environment,$(origin PRESET)),--preset $(PRESET)),--preset $(PRESET))
PORT ?= 8000
TOY_DATA := toy-data/community.json
BIN := .venv/bin
READY := .venv/.ready
IMAGES := data train service
KUBECTL ?= kubectl
# browser tests; container engine and what its networks need; base images; a registry; a cluster's store
SYSTEM_PACKAGES := chromium docker.io iptables mmdebstrap docker-registry etcd-server openssl podman prometheus
UV_LOCK := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet
# a worker for each of two processors, a file's tests in one of them; SPREAD= runs them in a row
SPREAD ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
FAST := not long and not gpu and not containers and not cluster and not kubernetes

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make run PRESET=full                     all pairs of the packaged data'
	@echo '  make run SET="loss.beta=0.2 seed=1"      other settings'
	@echo '  make run STORE=s3://bucket/prefix        publish to MinIO or another S3 store'
	@echo '  make run ARGS="--rerun sft"              any option of pipelines/submit.py'

.PHONY: setup
setup: $(READY) ## Make .venv from the lock file (about 5 GB, once)

$(READY): images/requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or pass PYTHON=/path/to/python3" >&2; exit 1; }
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and $(if $(wildcard $(BIN)/python),.venv was made by an older one: remove it,$(PYTHON) is older: pass PYTHON=/path/to/python3)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked packages into .venv (about 5 GB, a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r images/requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: run
run: setup ## Run the whole pipeline here (PRESET, SET, STORE, ARGS)
	@$(BIN)/python pipelines/submit.py --local $(RUN_PRESET) $(if $(STORE),--store '$(STORE)') $(foreach s,$(SET),--set '$(s)') $(ARGS)

.PHONY: api
api: setup ## The service and a worker on port 8000 (PORT, PRESET, SET, STORE, ARGS)
	@echo "The service: http://127.0.0.1:$(PORT)  (Ctrl-C ends it)"
	@$(BIN)/python -m pipelines.service --port $(PORT) --preset $(PRESET) $(if $(STORE),--store '$(STORE)') $(foreach s,$(SET),--set '$(s)') $(ARGS)

.PHONY: toy-data
toy-data: setup ## Write a small data set as a community posts it
	@$(BIN)/python -m dpo.data.toy

.PHONY: toy-train
toy-train: toy-data ## Train a tiny model on it with DPO
	@$(BIN)/python -m dpo train model=tiny loss=dpo datasets=[$(TOY_DATA)] optimizer=AdamW lr=1e-3 warmup_steps=1 max_length=96 max_prompt_length=48 exp_name=toy output=runs/toy/train/LATEST

.PHONY: toy-trigger
toy-trigger: setup ## Post it to the service and follow the run to its end (URL)
	@DPO_SERVICE_TOKEN="$${DPO_SERVICE_TOKEN:-$$(cat runs/docker/token 2>/dev/null)}" $(BIN)/python -m pipelines.service.toy trigger $(if $(URL),--url '$(URL)')

.PHONY: validate-structure
validate-structure: setup ## Check folders, configuration, compiled pipeline and imports
	@$(BIN)/python -m tests.support.structure
	@$(BIN)/python -m pytest --quiet --no-header tests/test_imports.py

.PHONY: test
test: setup ## Every test that needs no system package and no container engine
	@$(BIN)/python -m tests.support.minio --ensure
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(FAST)" $(SPREAD) $(PYTEST)

.PHONY: test-long
test-long: setup ## The tests that take minutes
	@$(BIN)/python -m tests.support.minio --ensure
	@$(BIN)/python -m pytest -m "long and not gpu and not containers and not cluster and not kubernetes" --timeout 3600 $(PYTEST)

.PHONY: test-gpu
test-gpu: setup ## The GPU tests; fails without a GPU
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU was found: torch.cuda.is_available() is false")'
	@$(BIN)/python -m pytest -m gpu $(PYTEST)

.PHONY: accept-gpu
accept-gpu: setup ## For an owner of a GPU: correctness, speed, memory, kill and resume, as one table
	@$(BIN)/python -m tests.acceptance.gpu $(ARGS)

.PHONY: test-containers
test-containers: setup ## The tests that run the pipeline in containers (builds the images first)
	@$(BIN)/python -m tests.support.minio --ensure
	@$(BIN)/python -m pytest -m containers --timeout 3600 $(PYTEST)

.PHONY: test-kubernetes
test-kubernetes: setup ## The tests on a real Kubernetes API server (built once, eight minutes)
	@$(BIN)/python -m tests.support.kubernetes --ensure
	@$(BIN)/python -m tests.support.trainer --ensure
	@$(BIN)/python -m tests.support.minio --ensure
	@$(BIN)/python -m pytest -m kubernetes $(PYTEST)

.PHONY: manifests-check
manifests-check: setup ## Manifests against the published schemas and a real API server
	@$(BIN)/python -m tests.support.kubernetes --ensure
	@$(BIN)/python -m tests.support.trainer --ensure
	@$(BIN)/python -m pytest tests/manifests $(PYTEST)

.PHONY: deploy
deploy: setup ## Apply manifests/overlays/OVERLAY to the current cluster (DEPLOYMENT, KUBECTL)
	@$(BIN)/python manifests/deploy.py '$(OVERLAY)' --kubectl '$(KUBECTL)' $(if $(DEPLOYMENT),--deployment '$(DEPLOYMENT)')

.PHONY: undeploy
undeploy: setup ## Remove what make deploy OVERLAY=... applied, with its volumes (KUBECTL)
	@$(BIN)/python manifests/deploy.py '$(OVERLAY)' --kubectl '$(KUBECTL)' --undo

.PHONY: images
images: setup ## Build the images data, train and service (TAG, BASE=image)
	@$(BIN)/python images/build.py build $(if $(BASE),--base '$(BASE)') $(if $(TAG),--tag '$(TAG)')

.PHONY: images-push
images-push: setup ## Push the images to REGISTRY and note their digests
	@test -n "$(REGISTRY)" || { echo "make images-push REGISTRY=host/path" >&2; exit 2; }
	@$(BIN)/python images/build.py push --registry '$(REGISTRY)'

.PHONY: images-check
images-check: setup ## Run each image as a random user, read-only, without network
	@$(BIN)/python images/check.py
	@$(BIN)/python images/build.py sizes

.PHONY: docker-build
docker-build: images ## The same as make images

.PHONY: docker-run
docker-run: setup ## The service and a worker in containers, on port 8000 (PORT, PRESET=toy)
	@$(BIN)/python images/run.py start --port $(PORT) $(if $(filter command line environment,$(origin PRESET)),--preset $(PRESET))

.PHONY: docker-clean
docker-clean: setup ## End these containers and remove the images that were built here
	@$(BIN)/python images/run.py clean

.PHONY: engine
engine: ## Start a container engine of this checkout's own (Debian, root); prints DOCKER_HOST
	@images/engine.sh start

.PHONY: engine-stop
engine-stop: ## End that engine and remove all it stored
	@images/engine.sh stop

.PHONY: test-cluster
test-cluster: setup ## The tests against the endpoint in KF_PIPELINES_ENDPOINT
	@test -n "$$KF_PIPELINES_ENDPOINT" || { echo "set KF_PIPELINES_ENDPOINT to a Kubeflow Pipelines endpoint" >&2; exit 1; }
	@$(BIN)/python -m pytest -m cluster $(PYTEST)

.PHONY: validate-data
validate-data: setup ## Say what is wrong with a data file (FILE=..., ARGS="--output json")
	@test -n "$(FILE)" || { echo "name a file: make validate-data FILE=toy-data/community.json" >&2; exit 2; }
	@$(BIN)/python -m dpo ingest --check '$(FILE)' $(SET) $(ARGS)

.PHONY: test-api
test-api: setup ## The tests of the service and of the Python interface
	@$(BIN)/python -m tests.support.minio --ensure
	@$(BIN)/python -m pytest -m "$(FAST)" tests/service tests/test_api.py tests/pipelines/test_python.py $(PYTEST)

.PHONY: bench
bench: setup ## The benchmarks, one JSON object a line
	@$(BIN)/python -m tests.benchmarks $(ARGS)

.PHONY: lint
lint: setup ## ruff, mypy, and that generated files are current
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pipelines.package --check
	@$(BIN)/python -m dpo.config.schemas --check

.PHONY: audit
audit: setup ## bandit over our code, pip-audit over the lock file (fails where its database is not reached)
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive dpo pipelines components
	@echo "bandit: nothing but what SECURITY.md answers"
	@$(BIN)/pip-audit --strict --require-hashes --disable-pip --requirement images/requirements.lock

.PHONY: sbom
sbom: setup ## Write the software bill of materials to build/sbom.json (CycloneDX)
	@# in an environment of its own: one of its packages adds a second to each process that imports kfp
	@test -x build/sbom/bin/cyclonedx-py || { $(PYTHON) -m venv build/sbom && build/sbom/bin/python -m pip install \
		--quiet --disable-pip-version-check --require-hashes -r images/sbom.lock; }
	@build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file build/sbom.json .venv/bin/python
	@echo "wrote build/sbom.json"

.PHONY: format
format: setup ## Let ruff format and fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: pipeline
pipeline: setup ## Compile the pipeline; for a cluster: REGISTRY, or DATA_IMAGE and TRAIN_IMAGE; DEPLOYMENT=cpu|gpu|spot|standalone|FILE, DEPLOY
ifeq ($(strip $(DEPLOYMENT)$(REGISTRY)$(DATA_IMAGE)$(TRAIN_IMAGE)$(DEPLOY)$(ARGS)),)
	@$(BIN)/python -m pipelines.package
else
	@$(if $(REGISTRY),$(BIN)/python images/build.py pushed --registry '$(REGISTRY)')
	@$(if $(DEPLOYMENT),,echo "deployment: cpu, without GPUs (DEPLOYMENT=gpu, spot, standalone or a file of yours changes it)")
	@$(BIN)/python -m pipelines.package --output build/preference_pipeline.yaml --deployment '$(or $(DEPLOYMENT),cpu)' \
		$(if $(DATA_IMAGE),--deploy 'images.data=$(DATA_IMAGE)') $(if $(TRAIN_IMAGE),--deploy 'images.train=$(TRAIN_IMAGE)') \
		$(if $(and $(DATA_IMAGE),$(TRAIN_IMAGE)),,$(if $(wildcard build/images.json),--images build/images.json)) $(foreach s,$(DEPLOY),--deploy '$(s)') $(ARGS)
endif

.PHONY: schemas
schemas: setup ## Write config/schemas/*.json from the types
	@$(BIN)/python -m dpo.config.schemas

.PHONY: lock
lock: setup ## Resolve the lock files of development and images again
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --extra dev $(UV_LOCK) -o images/requirements.lock
	@echo 'cyclonedx-bom>=7' | $(BIN)/uv pip compile - $(UV_LOCK) -o images/sbom.lock
	@for image in $(IMAGES); do $(BIN)/uv pip compile pyproject.toml $(UV_LOCK) \
		--constraint images/requirements.lock $$(sed 's/^/--extra /' images/$$image/extras) \
		-o images/$$image/requirements.lock; done

.PHONY: setup-system
setup-system: ## Install the system packages that further tests use (Debian, as root)
	@command -v apt-get >/dev/null || { echo "apt-get was not found: install by hand what is wanted of $(SYSTEM_PACKAGES)" >&2; exit 1; }
	@apt-get update -qq
	@DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null
	@echo "installed: $(SYSTEM_PACKAGES)"

.PHONY: clean
clean: ## Remove what runs, builds and tests left (not .venv, not the model cache)
	@rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "removed runs, builds and caches"
