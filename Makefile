# The commands a person types. Everything they do is in `cargo` and in the program `galleonfs-lab` (tests/).

CARGO ?= cargo
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
LAB_DEV := $(CARGO) run --quiet --locked -p galleonfs-tests --bin galleonfs-lab --
LAB := $(CARGO) run --quiet --release --locked -p galleonfs-tests --no-default-features --bin galleonfs-lab --

.PHONY: help demo demo-down test test-cluster crash model sim mutants fuzz bench check lab-binaries

help:
	@echo 'make demo          a Kubernetes of three nodes on this machine with GalleonFS in it (root)'
	@echo '                   KUBECONFIG=file IMAGE=repository:tag   into that cluster instead'
	@echo 'make demo-down     ends it'
	@echo 'make test          every test, also those in a real Kubernetes (root)'
	@echo 'make crash         more crash states of the store: SEEDS=n FIRST=m'
	@echo 'make model         the model of replication in larger bounds: minutes, and gigabytes of memory'
	@echo 'make sim           more seeds of the simulated cluster: SEEDS=n FIRST=m'
	@echo 'make mutants       mistakes in replication, switched on one at a time, that the simulator must find'
	@echo 'make fuzz          every decoder under libFuzzer: SECONDS=n for each, TARGETS="a b"'
	@echo 'make test-cluster  the tests in a real Kubernetes alone, of a release build (root)'
	@echo 'make bench         speed through the real device, beside the raw file (root)'
	@echo 'make check         formatting, lints, licences'
	@echo 'make lab-binaries  builds and caches what the cluster is made of'

demo:
	$(LAB) demo $(if $(IMAGE),--image $(IMAGE))

demo-down:
	$(LAB) demo-down

lab-binaries:
	$(LAB) build

# On a machine that may be new: packages and the programs that some tests run come first, and are cached. One test
# that fails keeps no other from running. The tests in a Kubernetes are among them, and try the program that cargo has
# just built for the others; `make test GALLEONFS_CLUSTER_TESTS=` leaves them out.
test: export GALLEONFS_CLUSTER_TESTS ?= 1
test: export GALLEONFS_PROGRAM ?= $(TARGET)/debug/galleonfs
test:
	GALLEONFS_LAB_BIN=$$($(LAB_DEV) build) && export GALLEONFS_LAB_BIN && \
		$(CARGO) test --workspace --locked --no-fail-fast

# Those in a Kubernetes alone, with the program as it is released.
test-cluster:
	$(CARGO) build --release --locked -p galleonfs
	GALLEONFS_PROGRAM=$(TARGET)/release/galleonfs GALLEONFS_CLUSTER_TESTS=1 \
		$(CARGO) test --locked -p galleonfs-tests --test cluster

# More crash states than `make test`: SEEDS of them from FIRST on, each about a thousand states.
crash:
	SEEDS=$(or $(SEEDS),500) FIRST=$(or $(FIRST),1000) \
		$(CARGO) test --locked -p galleonfs-storage-engine --test engine -- crash --nocapture

# The model of replication in the bounds that take too long for `make test`.
model:
	$(CARGO) test --locked -p galleonfs-sim --test model larger -- --ignored --nocapture --test-threads 1

# Replication on simulated nodes: SEEDS of them from FIRST on, with REAL=1 on the real store. A seed that fails is run again with SEEDS=1 FIRST=it.
SIM := $(CARGO) run --quiet --locked -p galleonfs-sim --
sim:
	$(SIM) --seeds $(or $(SEEDS),10000) --first $(or $(FIRST),1) $(if $(REAL),--real)

mutants:
	$(SIM) --mutants --seeds $(or $(SEEDS),5000) --first $(or $(FIRST),1)

# What cargo-fuzz passes to the compiler, without what only a nightly one takes. New inputs that reach new code are kept in
# target/fuzz/corpus; one that fails is written to target/fuzz/failed, and belongs into fuzz/corpus when it is mended.
FUZZ_DIR := $(TARGET)/fuzz
FUZZ_PROGRAM := $(FUZZ_DIR)/x86_64-unknown-linux-gnu/release/galleonfs-libfuzzer
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1
fuzz: SECONDS ?= 60
fuzz: TARGETS ?= $(notdir $(wildcard fuzz/corpus/*))
fuzz:
	cd fuzz/libfuzzer && CARGO_TARGET_DIR=$(FUZZ_DIR) CARGO_INCREMENTAL=0 RUSTFLAGS="$(FUZZ_FLAGS)" \
		$(CARGO) build --release --locked --target x86_64-unknown-linux-gnu $(FUZZ_FEATURES)
	for target in $(TARGETS); do \
		mkdir -p $(FUZZ_DIR)/corpus/$$target $(FUZZ_DIR)/failed && \
		FUZZ_TARGET=$$target $(FUZZ_PROGRAM) $(FUZZ_DIR)/corpus/$$target fuzz/corpus/$$target \
			-max_total_time=$(SECONDS) -timeout=30 -rss_limit_mb=2048 -print_final_stats=1 \
			-artifact_prefix=$(FUZZ_DIR)/failed/$$target- || exit 1; \
	done

bench:
	$(CARGO) run --release --locked -p galleonfs-tests --features plain-wire --bin galleonfs-bench

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) deny --locked check bans licenses sources
