# CUDA, included by the Makefile. make test runs rkv_cuda.cu on the host, over tests/cuda_shim.h,
# and compiles it for every architecture that an installed nvcc knows; make test-cuda and make
# bench-cuda need a GPU. What is missing is said and skipped.

NVCC       ?= nvcc
CUDA_ARCH  ?= native
SANITIZER  ?= compute-sanitizer
CUDA_DIR    = $(BUILD)/cuda
CUDA_WARNINGS = -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wconversion,-Wshadow
CUDA_FLAGS  = -I. -Itests -std=c++14 -O3 $(CUDA_WARNINGS)
SHIM_FLAGS  = -I. -Itests -std=c++14 $(OPT) $(WARNINGS) -Wno-unknown-pragmas $(CXXFLAGS)
CUDA_ARCHS := $(shell $(NVCC) --list-gpu-arch 2>/dev/null | sed -n 's/^compute_//p' | \
                      awk '$$1 >= 75' | sort -n)

# ---- Without a GPU ------------------------------------------------------------------------------

ifneq ($(shell command -v $(CXX) 2>/dev/null),)
EXTRA_TESTS += $(BUILD)/tests/test_cuda
else
EXTRA_CHECKS += cuda-no-cxx
endif
EXTRA_CHECKS += $(if $(CUDA_ARCHS),$(CUDA_ARCHS:%=$(CUDA_DIR)/sm_%.o),cuda-no-nvcc)

.PHONY: cuda-no-cxx cuda-no-nvcc
cuda-no-cxx:
	@echo 'skip  rkv_cuda.cu over the shim: no C++ compiler'
cuda-no-nvcc:
	@echo 'skip  rkv_cuda.cu for each GPU architecture: no nvcc'

$(CUDA_DIR)/shim/kernels.o: rkv_cuda.cu rkv.h tests/cuda_shim.h tests/cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) -include tests/cuda_shim.h -x c++ -c $< -o $@
$(CUDA_DIR)/shim/test.o: tests/test_cuda.cc rkv.h tests/harness.h tests/oracle.h tests/cuda_shim.h
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) -include tests/cuda_shim.h -c $< -o $@
$(BUILD)/tests/test_cuda: $(CUDA_DIR)/shim/test.o $(CUDA_DIR)/shim/kernels.o $(TEST_SHARED)
	@mkdir -p $(@D)
	$(CXX) $^ -o $@ $(LIBS)

$(CUDA_DIR)/sm_%.o: rkv_cuda.cu rkv.h tests/cuda.mk
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -gencode arch=compute_$*,code=sm_$* -c $< -o $@

# ---- On a GPU -----------------------------------------------------------------------------------

HAVE_GPU = command -v $(NVCC) >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
GPU_FLAGS = $(CUDA_FLAGS) -arch=$(CUDA_ARCH)
RKV_COMMIT = $$(git rev-parse --short HEAD 2>/dev/null || echo -)

.PHONY: cuda test-cuda bench-cuda
cuda: $(CUDA_DIR)/rkv_cuda.o

$(CUDA_DIR)/rkv_cuda.o: rkv_cuda.cu rkv.h tests/cuda.mk
	@mkdir -p $(@D)
	$(NVCC) $(GPU_FLAGS) -lineinfo -c $< -o $@
$(CUDA_DIR)/test_cuda: tests/test_cuda.cc $(CUDA_DIR)/rkv_cuda.o $(TEST_SHARED)
	$(NVCC) $(GPU_FLAGS) $^ -o $@ -lm -lpthread
$(CUDA_DIR)/bench_cuda: bench/bench_cuda.cu $(CUDA_DIR)/rkv_cuda.o $(BUILD)/obj/tests/rkv_impl.o
	$(NVCC) $(GPU_FLAGS) $^ -o $@ -lm -lpthread

# The sanitizers are slow: they get a choice of cases that runs every kernel.
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
