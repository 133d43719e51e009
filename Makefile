# The commands of this project; each installs what it needs into .venv, once.
#   PYTHON=python3.13   the interpreter that .venv is made with
#   ARGS="-x -k redis"  what to pass on to pytest or the benchmarks

PYTHON = python3
BIN = .venv/bin
SANITIZERS = address,undefined
# Tests that need no server, and run the compiled code.
CORE_TESTS = $(wildcard $(addprefix tests/test_,$(addsuffix .py,parity cookies payload session)))

.DEFAULT_GOAL = help
.PHONY: help develop demo test test-pure test-browser test-asan test-trace lint bench docs release clean servers
.PHONY: build/asan build/trace

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.13] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

develop: .venv/has-lint  ## a virtual environment in .venv with all that development needs

demo: .venv/has-all  ## the example application, on http://127.0.0.1:8080
	$(BIN)/python examples/shop.py --host 127.0.0.1 --port 8080

test: .venv/has-test servers  ## the tests, over both implementations
	@echo "Testing with $$($(BIN)/python --version) in .venv, over the compiled and the pure implementation."
	@echo "Redis and memcached servers are started on free ports of 127.0.0.1, and ended afterwards."
	@$(BIN)/python -m pytest $(ARGS) && echo "All tests passed." || \
	    { echo "Some tests failed: see above. ARGS='-x -k NAME' runs one."; exit 1; }

test-pure: .venv/has-test servers  ## the tests, without extensions
	AIOHTTP_SESSION_NO_EXTENSIONS=1 $(BIN)/python -m pytest $(ARGS)

# The example shop in a browser, and what that makes of cookies. Its connections make asyncio warn.
test-browser: .venv/has-test  ## the tests in Chromium
	@which chromium chromedriver >/dev/null || .ci/apt-install chromium chromium-driver
	$(BIN)/python -m pytest tests/browser -o "python_files=check_*.py" \
	    -W ignore::pytest.PytestUnraisableExceptionWarning $(ARGS)

# The compiled core under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan: build/asan  ## the compiled core's tests under the address sanitizer
	cd $< && CFLAGS="-fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	    LDFLAGS="-fsanitize=$(SANITIZERS)" AIOHTTP_SESSION_DEBUG_BUILD=1 $(INSTALL_COPY)
	cd $< && LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(CURDIR)/$(BIN)/python -m pytest $(CORE_TESTS) $(ARGS)

# Which lines of the .pyx files the tests reach. Coverage wants the generated C beside them.
test-trace: build/trace  ## which lines of the extensions the tests reach
	$(BIN)/pip install --quiet cython
	cd $< && AIOHTTP_SESSION_TRACE=1 $(INSTALL_COPY)
	cp -R $</source/src_ext $</source/build/cython/src_ext $<
	sed -i -e 's/^source = .*/source = ["src_ext"]\nplugins = ["Cython.Coverage"]/' \
	    -e 's/^fail_under = .*//' $</pyproject.toml
	cd $< && $(CURDIR)/$(BIN)/python -m pytest $(CORE_TESTS) $(ARGS) --cov

# A copy to build in, so that no object file of an unusual build gets into the next one.
INSTALL_COPY = AIOHTTP_SESSION_REQUIRE_EXTENSIONS=1 \
    $(CURDIR)/$(BIN)/pip install --quiet --no-deps --target . ./source
build/asan build/trace: .venv/has-test
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
	$(BIN)/pyright --pythonpath $(BIN)/python --verifytypes aiohttp_session --ignoreexternal
	$(BIN)/python -m mypy.stubtest $(patsubst aiohttp_session/%.pyi,aiohttp_session.%,$(wildcard aiohttp_session/*.pyi))

bench: .venv/has-bench servers  ## the benchmark; ARGS=--quick for a short one
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/has-docs  ## the documentation, in build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

release: .venv/has-lint  ## sdist and wheel in dist, built and checked
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
	$(PYTHON) -m venv .venv

# The package is installed editable, with one of its extras and the extensions beside its modules.
.venv/has-%: pyproject.toml setup.py $(wildcard src_ext/*.p*) | .venv/bin/python
	$(if $(filter all,$*),,AIOHTTP_SESSION_REQUIRE_EXTENSIONS=1) $(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
