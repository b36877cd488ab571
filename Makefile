# The front door. Each target is one line; what it does is in scripts/ or in the programs.

.DEFAULT_GOAL := help
# `setup build` is an order: with -j, too. (cargo uses all cores by itself.)
.NOTPARALLEL:
.PHONY: setup setup-tests build build-guest demo test test-long test-firecracker firecracker-given bench bench-capture bench-pager lint clean help

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Tests boot the same static agent as the programs do, not the one that `cargo test` links beside them.
export TORPOR_ENVD := $(TARGET_DIR)/release/envd
# The same lines on a terminal, in a pipe and in CI.
export CARGO_TERM_COLOR := never
export CARGO_TERM_PROGRESS_WHEN := never

setup: ## get what is missing: apt packages, guest kernel, base root file system
	@scripts/setup

build: ## build the programs and the guest's agent
	@scripts/build

build-guest: ## build only what runs in guests, which is all that tests need
	@scripts/build --guest

demo: setup build ## run the main job on a real guest: target/demo/report.json and report.svg
	@$(TARGET_DIR)/release/torpor-demo

setup-tests: ## the set-up with what only tests need
	@scripts/setup --tests

# With a Firecracker named, its tests would run beside all others, and want KVM.
test: setup-tests build-guest ## run every test, real guests included
	@env -u TORPOR_FIRECRACKER cargo test --locked --workspace
	@echo "make test: the tests against a real Firecracker were not run (make test-firecracker FIRECRACKER=/path/to/firecracker)"

test-long: setup-tests build-guest ## the same with the models run for thousands of cases, and tests that take long
	@PROPTEST_CASES=5000 env -u TORPOR_FIRECRACKER cargo test --locked --workspace -- --include-ignored && cargo test --locked -p torpor-pager --lib --features shuttle interleavings

test-firecracker: firecracker-given setup build-guest ## test against a real Firecracker: FIRECRACKER=/path/to/firecracker (without KVM: in the lab)
	@scripts/test-firecracker "$(FIRECRACKER)"

# Before anything is set up or built.
firecracker-given:
	@test -f "$(FIRECRACKER)" -a -x "$(FIRECRACKER)" || { echo 'make test-firecracker: no executable Firecracker at "$(FIRECRACKER)"; say make test-firecracker FIRECRACKER=/path/to/firecracker' >&2; exit 1; }

bench: setup build ## measure, against the bars that the README names
	@$(TARGET_DIR)/release/torpor-bench

bench-capture: setup build ## measure the free-page scan and the references, beside their peers: target/bench-capture/report.json and report.svg
	@$(TARGET_DIR)/release/torpor-bench-capture

bench-pager: ## measure the pager beside its physical limits: target/bench-pager/pager.{json,svg}
	@PAGER_BENCH_OUT=$(TARGET_DIR)/bench-pager cargo bench --locked --package torpor-pager --bench pager

lint: ## formatting, clippy and rustdoc, all without warnings
	@cargo fmt --all --check && cargo clippy --locked --workspace --all-targets -- -D warnings && cargo check --locked --package torpor-pager --tests --features shuttle && RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps

clean: ## remove what was built (the set-up's cache stays)
	@cargo clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.* ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
