# The end-to-end example: a small model that reasons, its trainer, and the study of cache policies.
# Included by the Makefile. The arithmetic alone is built for this very machine.

MODEL     ?= examples/ponder/models/ponder.gguf
EVAL      ?=
TRAIN     ?=
NATIVE    := $(if $(RUNNER),,$(shell \
              $(CC) -march=native -E -x c /dev/null >/dev/null 2>&1 && echo -march=native))

ENGINE    = $(patsubst %,$(BUILD)/obj/examples/ponder/%.o, \
              study solve own_cache policy model gguf task kernels seconds options rkv_impl)

$(BUILD)/obj/examples/ponder/kernels.o: C_FLAGS += -O3 -ffp-contract=fast $(NATIVE)
$(BUILD)/obj/examples/ponder/backprop.o: C_FLAGS += -O3 $(NATIVE)

$(BUILD)/demo: $(patsubst %,$(BUILD)/obj/examples/ponder/%.o,demo page plot managed_cache) $(ENGINE)
	$(link)

$(BUILD)/eval: $(patsubst %,$(BUILD)/obj/examples/ponder/%.o,eval plot) $(ENGINE)
	$(link)

$(BUILD)/train: $(patsubst %,$(BUILD)/obj/examples/ponder/%.o, \
    train model_put backprop kernels task gguf seconds options)
	$(link)

.PHONY: demo eval train
demo: $(BUILD)/demo
	$< --model $(MODEL) --html $(BUILD)/demo.html $(DEMO)

# Resumable, from nothing where the model is a newer one; `make eval EVAL='--quick'` for a short one.
eval: $(BUILD)/eval
	@if [ $(MODEL) -nt $(BUILD)/eval.csv ]; then rm -f $(BUILD)/eval.csv; fi
	$< --model $(MODEL) --csv $(BUILD)/eval.csv --svg $(BUILD)/eval.svg $(EVAL)

# Resumable: the same command goes on where it was stopped.
train: $(BUILD)/train
	$< --task ponder --seed 2 --out $(MODEL) $(TRAIN)

PROGRAM_TEST = $(BUILD)/tests/test_programs
$(PROGRAM_TEST): tests/test_programs.sh $(BUILD)/demo $(BUILD)/eval $(BUILD)/train
	@mkdir -p $(@D)
	@printf '#!/bin/sh\nexec sh $< $(BUILD) %s\n' '$(firstword $(RUNNER))' >$@ && chmod +x $@

# Another runtime reads the same file.
.PHONY: test-peer
test-peer: $(BUILD)/demo
	@if $(PYTHON) -c 'import accelerate, gguf, torch, transformers' 2>/dev/null; then \
	    $(PYTHON) tests/peer_transformers.py $< $(MODEL) 2>$(BUILD)/peer.log; \
	else echo 'skip  test-peer: $(PYTHON) lacks torch, transformers, accelerate or gguf'; fi

# The engine's test needs the engine; the library's code comes with every test.
$(BUILD)/tests/test_engine: $(patsubst %,$(BUILD)/obj/examples/ponder/%.o, \
    managed_cache own_cache policy model gguf kernels seconds)
