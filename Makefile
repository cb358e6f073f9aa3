# The commands a person types. Everything they do is in `cargo` and in the program `galleonfs-lab` (tests/).

CARGO ?= cargo
LAB := $(CARGO) run --quiet --release --locked -p galleonfs-tests --no-default-features --bin galleonfs-lab --

.PHONY: help demo demo-down test test-cluster bench check lab-binaries

help:
	@echo 'make demo          a Kubernetes of three nodes on this machine with GalleonFS in it (root)'
	@echo '                   KUBECONFIG=file IMAGE=repository:tag   into that cluster instead'
	@echo 'make demo-down     ends it'
	@echo 'make test          every test that needs no cluster'
	@echo 'make test-cluster  the tests in a real Kubernetes (root)'
	@echo 'make bench         speed through the real device, beside the raw file (root)'
	@echo 'make check         formatting, lints, licences'
	@echo 'make lab-binaries  builds and caches what the cluster is made of'

demo:
	$(LAB) demo $(if $(IMAGE),--image $(IMAGE))

demo-down:
	$(LAB) demo-down

lab-binaries:
	$(LAB) build

test:
	$(CARGO) test --workspace --locked

test-cluster:
	$(CARGO) build --release --locked -p galleonfs
	GALLEONFS_CLUSTER_TESTS=1 $(CARGO) test --locked -p galleonfs-tests --test cluster

bench:
	$(CARGO) run --release --locked -p galleonfs-tests --bin galleonfs-bench

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) deny --locked check
