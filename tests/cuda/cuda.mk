# CUDA, included by the Makefile. make test runs rkv_cuda.cu on the host, over tests/cuda/shim.h,
# and where there is nvcc compiles it for three architectures (40 s each); make cuda-archs does for
# all that nvcc knows. make test-cuda-ptx runs its PTX on the host; make test-cuda and make
# bench-cuda need a GPU. A target whose tools are not installed says so and is skipped.

NVCC       ?= nvcc
CUDA_ARCH  ?= native
SANITIZER  ?= compute-sanitizer
CUDA_DIR    = $(BUILD)/cuda
CUDA_WARNINGS = -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wconversion,-Wshadow
CUDA_FLAGS  = -I. -Itests -std=c++14 -O3 $(CUDA_WARNINGS)
SHIM_FLAGS  = -I. -Itests -std=c++14 $(OPT) $(WARNINGS) -Wno-unknown-pragmas $(CXXFLAGS)
SHIM_HEADERS = rkv.h tests/golden_names.h tests/harness.h tests/oracle.h tests/cuda/policies.h \
               tests/cuda/shim.h tests/cuda/race.h
CUDA_ARCHS := $(shell $(NVCC) --list-gpu-arch 2>/dev/null | sed -n 's/^compute_//p' | \
                      awk '$$1 >= 75' | sort -n)
TEST_ARCHS  = $(sort $(firstword $(CUDA_ARCHS)) $(filter 90,$(CUDA_ARCHS)) $(lastword $(CUDA_ARCHS)))

# ---- Without a GPU ------------------------------------------------------------------------------

ifneq ($(shell command -v $(CXX) 2>/dev/null),)
EXTRA_TESTS += $(patsubst %,$(BUILD)/tests/%,test_cuda cuda_from_c cuda_one_unit \
                 cuda_one_unit_static)
EXTRA_CHECKS += $(CUDA_DIR)/shim/static_alone.refused
else
EXTRA_CHECKS += cuda-no-cxx
endif
EXTRA_CHECKS += $(if $(CUDA_ARCHS),$(TEST_ARCHS:%=$(CUDA_DIR)/sm_%.o) \
                  $(CUDA_DIR)/one_unit.o $(CUDA_DIR)/one_unit_static.o,cuda-no-nvcc)

.PHONY: cuda-archs cuda-no-cxx cuda-no-nvcc
cuda-archs: $(if $(CUDA_ARCHS),$(CUDA_ARCHS:%=$(CUDA_DIR)/sm_%.o),cuda-no-nvcc)
cuda-no-cxx:
	@echo 'skip  rkv_cuda.cu over the shim: no C++ compiler'
cuda-no-nvcc:
	@echo 'skip  rkv_cuda.cu for each GPU architecture: no nvcc'

$(CUDA_DIR)/shim/kernels.o: rkv_cuda.cu rkv.h tests/cuda/shim.h tests/cuda/race.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) -include tests/cuda/shim.h -x c++ -c $< -o $@
$(CUDA_DIR)/shim/test.o: tests/cuda/test_cuda.cc $(SHIM_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) -include tests/cuda/shim.h -c $< -o $@
$(BUILD)/tests/test_cuda: $(CUDA_DIR)/shim/test.o $(CUDA_DIR)/shim/kernels.o $(TEST_SHARED)
	@mkdir -p $(@D)
	$(CXX) $^ -o $@ $(LIBS)

# A program in C; all in one translation unit, from g++ and from nvcc; RKV_STATIC with the
# implementation elsewhere, which must be refused in words.
ONE_UNIT = tests/cuda/one_unit.cc tests/cuda/consumer.c rkv_cuda.cu rkv.h tests/cuda/cuda.mk
$(BUILD)/tests/cuda_from_c: $(BUILD)/obj/tests/cuda/consumer.o $(CUDA_DIR)/shim/kernels.o \
        $(BUILD)/obj/tests/rkv_impl.o
	@mkdir -p $(@D)
	$(CXX) $^ -o $@ $(LIBS)
$(BUILD)/tests/cuda_one_unit $(BUILD)/tests/cuda_one_unit_static: $(ONE_UNIT) tests/cuda/shim.h
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) $(if $(findstring static,$@),-DRKV_STATIC) -include tests/cuda/shim.h \
	    -x c++ $< -o $@ $(LIBS)
$(CUDA_DIR)/one_unit.o $(CUDA_DIR)/one_unit_static.o: $(ONE_UNIT)
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) $(if $(findstring static,$@),-DRKV_STATIC) -x cu \
	    -arch=compute_$(firstword $(CUDA_ARCHS)) -c $< -o $@
$(CUDA_DIR)/shim/static_alone.refused: rkv_cuda.cu rkv.h tests/cuda/shim.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	@! $(CXX) $(SHIM_FLAGS) -DRKV_STATIC -include tests/cuda/shim.h -x c++ -c $< -o $@.o 2>$@.out
	@grep -q 'error.*RKV_STATIC' $@.out && mv $@.out $@

$(CUDA_DIR)/sm_%.o: rkv_cuda.cu rkv.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -gencode arch=compute_$*,code=sm_$* -c $< -o $@

# ---- PTX ----------------------------------------------------------------------------------------

# The PTX of every architecture, or of PTX_ARCHS, runs on the host. The shim finds a kernel by its
# symbol, so static kernels need global symbols.
PTX_DIR   = $(CUDA_DIR)/ptx
PTX_FLAGS = $(SHIM_FLAGS) -DRKV_CUDA_PTX -include tests/cuda/shim.h
PTX_ARCH  = 90
PTX_ARCHS = $(CUDA_ARCHS)

.PHONY: test-cuda-ptx
test-cuda-ptx:
	@if [ -z '$(CUDA_ARCHS)' ]; then echo 'skip  test-cuda-ptx: no nvcc'; exit 0; fi; \
	$(MAKE) --no-print-directory $(PTX_ARCHS:%=$(PTX_DIR)/sm_%.ptx) \
	    $(BUILD)/tests/test_cuda_ptx && \
	for arch in $(PTX_ARCHS); do \
	    echo "sm_$$arch"; RKV_PTX=$(PTX_DIR)/sm_$$arch.ptx $(BUILD)/tests/test_cuda_ptx || exit 1; \
	done

$(PTX_DIR)/sm_%.ptx: rkv_cuda.cu rkv.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -DRKV_CUDA_PARAMETER_BYTES=5120 -ptx -arch=compute_$* $< -o $@
$(PTX_DIR)/kernels.o: rkv_cuda.cu rkv.h tests/cuda/shim.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(PTX_FLAGS) -x c++ -c $< -o $@
	objcopy --wildcard --globalize-symbol='_Z*rkvi_*' $@
$(PTX_DIR)/test.o: tests/cuda/test_cuda.cc $(SHIM_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(PTX_FLAGS) -c $< -o $@
$(PTX_DIR)/ptx.o: tests/cuda/ptx.cc tests/cuda/shim.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(PTX_FLAGS) -std=c++17 -O3 -march=native -ffp-contract=off -fwrapv \
	    -fno-strict-aliasing -DRKV_PTX_FILE='"$(PTX_DIR)/sm_$(PTX_ARCH).ptx"' -c $< -o $@
$(BUILD)/tests/test_cuda_ptx: $(PTX_DIR)/test.o $(PTX_DIR)/kernels.o $(PTX_DIR)/ptx.o \
        $(TEST_SHARED)
	@mkdir -p $(@D)
	$(CXX) -rdynamic $^ -o $@ $(LIBS) -ldl

# Counts what each kernel executes, for one layer of each shape of bench-cuda and for keys of a real
# model.
PTX_COUNT = RKV_PTX_COUNTS=1 $(PTX_DIR)/count_cuda
.PHONY: count-cuda
count-cuda:
	@if [ -z '$(CUDA_ARCHS)' ]; then echo 'skip  count-cuda: no nvcc'; exit 0; fi; set -e; \
	$(MAKE) --no-print-directory $(PTX_DIR)/sm_$(PTX_ARCH).ptx $(PTX_DIR)/count_cuda; \
	$(PTX_COUNT) 2 6 128 1152 1024 bf16 'cosine 0.7'; \
	for type in bf16 f16 f32; do $(PTX_COUNT) 8 4 128 1152 1024 $$type 'cosine 0.7'; done; \
	for keys in 'cosine 0.4' distinct; do $(PTX_COUNT) 8 4 128 1152 1024 bf16 "$$keys"; done; \
	$(PTX_COUNT) 8 4 128 16807 8403 bf16 'cosine 0.7'; \
	for policy in wide memory_traces h2o triattention random; do \
	    $(PTX_COUNT) 8 4 128 1152 1024 bf16 'cosine 0.7' $$policy; done; \
	for layer in prose_layer00 prose_layer02 prose_layer15 trace_layer22; do \
	    $(PTX_COUNT) real_$${layer}_f16; done

$(PTX_DIR)/count_cuda.o: bench/count_cuda.cc bench/job.h tests/golden_file.h tests/cuda/shim.h \
        tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(PTX_FLAGS) -c $< -o $@
$(PTX_DIR)/count_cuda: $(PTX_DIR)/count_cuda.o $(PTX_DIR)/kernels.o $(PTX_DIR)/ptx.o \
        $(patsubst %,$(BUILD)/obj/%.o,bench/job tests/harness tests/golden_file tests/rkv_impl)
	$(CXX) -rdynamic $^ -o $@ $(LIBS) -ldl

# ---- Races --------------------------------------------------------------------------------------

# The kernels report every access to tests/cuda/race.cc; no libtsan is linked. Without -pie the code
# is below 4 GB, which that file needs; -g gives line numbers. The cases are those of
# test-cuda-sanitize and more. MUTANTS="NAME..." removes barriers instead: see
# tests/cuda/race_mutants.sh.
RACE_SOURCE = rkv_cuda.cu
RACE_DIR    = $(CUDA_DIR)/race
RACE_FLAGS  = $(SHIM_FLAGS) -g -fno-pie -fno-threadsafe-statics -DRKV_CUDA_RACE \
              -include tests/cuda/shim.h
RACE_CASES ?= 40

.PHONY: test-cuda-race
test-cuda-race:
	@if ! command -v $(CXX) >/dev/null; then echo 'skip  test-cuda-race: no C++ compiler'; \
	elif [ -n '$(MUTANTS)' ]; then CXX='$(CXX)' sh tests/cuda/race_mutants.sh $(MUTANTS); \
	else \
	    $(MAKE) --no-print-directory $(RACE_DIR)/test_cuda && \
	    $(RACE_DIR)/test_cuda kernels $(RACE_CASES); fi

$(RACE_DIR)/kernels.o: $(RACE_SOURCE) $(SHIM_HEADERS) tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(RACE_FLAGS) -O1 -fsanitize=thread -x c++ -c $< -o $@
$(RACE_DIR)/%.o: tests/cuda/%.cc $(SHIM_HEADERS) tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(RACE_FLAGS) -c $< -o $@
$(RACE_DIR)/test_cuda: $(RACE_DIR)/kernels.o $(RACE_DIR)/test_cuda.o $(RACE_DIR)/race.o \
        $(TEST_SHARED)
	$(CXX) -no-pie -Wl,--wrap=memcpy,--wrap=memset $^ -o $@ $(LIBS)

# ---- On a GPU -----------------------------------------------------------------------------------

HAVE_GPU = command -v $(NVCC) >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
GPU_FLAGS = $(CUDA_FLAGS) -arch=$(CUDA_ARCH)
RKV_COMMIT = $$(git rev-parse --short HEAD 2>/dev/null || echo -)

.PHONY: cuda test-cuda bench-cuda
cuda: $(CUDA_DIR)/rkv_cuda.o

$(CUDA_DIR)/rkv_cuda.o: rkv_cuda.cu rkv.h tests/cuda/cuda.mk
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) -lineinfo -c $< -o $@
$(CUDA_DIR)/test_cuda: tests/cuda/test_cuda.cc $(CUDA_DIR)/rkv_cuda.o $(TEST_SHARED)
	$(NVCC) $(GPU_FLAGS) $^ -o $@ -lm -lpthread
$(CUDA_DIR)/bench_cuda: bench/bench_cuda.cu $(CUDA_DIR)/rkv_cuda.o $(BUILD)/obj/tests/rkv_impl.o
	$(NVCC) $(GPU_FLAGS) $^ -o $@ -lm -lpthread

# The sanitizers are slow: they run a few cases that use every kernel.
test-cuda:
	@if $(HAVE_GPU); then \
	    $(MAKE) --no-print-directory $(CUDA_DIR)/test_cuda && $(CUDA_DIR)/test_cuda && \
	    $(MAKE) --no-print-directory test-cuda-sanitize; \
	else echo 'skip  test-cuda: needs nvcc and a GPU'; fi

.PHONY: test-cuda-sanitize
test-cuda-sanitize: $(CUDA_DIR)/test_cuda
	@if ! command -v $(SANITIZER) >/dev/null; then echo 'skip  no $(SANITIZER)'; exit 0; fi; \
	for tool in memcheck racecheck initcheck synccheck; do \
	    echo "$(SANITIZER) --tool $$tool"; \
	    $(SANITIZER) --tool $$tool --error-exitcode 9 $< kernels || failed=1; \
	done; test -z "$$failed"

bench-cuda:
	@if $(HAVE_GPU); then \
	    mkdir -p bench/results && rm -f $(CUDA_DIR)/peer_torch.tsv && \
	    $(MAKE) --no-print-directory $(CUDA_DIR)/bench_cuda && \
	    if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	        $(PYTHON) bench/peer_torch_cuda.py $(CUDA_DIR)/peer_torch.tsv; \
	    else echo '# PyTorch formulation: not run, $(PYTHON) has no torch'; fi; \
	    $(CUDA_DIR)/bench_cuda --csv bench/results/cuda.csv --peer $(CUDA_DIR)/peer_torch.tsv \
	        --date $$(date -u +%Y-%m-%d) --commit $(RKV_COMMIT); \
	else echo 'skip  bench-cuda: needs nvcc and a GPU'; fi
