# tvmm: `make demo` shows the main job, `make test` runs every test; both install what is missing first.

TARGET  := x86_64-unknown-linux-gnu
BINARY  := target/$(TARGET)/release/tvmm
PREFIX  ?= /usr/local
# A static binary at a fixed address: nothing to link, nothing to relocate at process start, which is part of every
# restore.
STATIC  := -C target-feature=+crt-static -C relocation-model=static
BUILD   := RUSTFLAGS="$(STATIC)" cargo build --release --locked --target $(TARGET)

CASES   ?= 20000
SECONDS ?= 600
KILLS   ?= 200
REWINDS ?= 10000
STANDBY ?= 500
MOMENTS ?= 5000

.PHONY: build agent demo test test-features fuzz fuzz-all seccomp-trace deny sbom soak endure lint setup install install-service bench testbed testbed-hosts testbed-rdma testbed-build linux-kernel linux-rootfs

build: setup
	$(BUILD)
	@echo "built $(BINARY)"

# What answers requests in Linux guests; see resources/agent/README.md.
agent: setup
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target $(TARGET) \
		--manifest-path resources/agent/Cargo.toml --target-dir target/agent

demo: build
	@resources/demo.sh $(BINARY)

# The debug build first (with overflow checks), then the same integration tests against the binary that ships. Ends with
# `N passed, N failed, N skipped: KIND N, ...`. TVMM_REQUIRE=KIND,... makes skips of those kinds failures.
test: build
	TVMM_BINARY=$(CURDIR)/$(BINARY) tests/run.sh debug release guest

# What is not in every build: cold pools in object stores, spans for a collector.
FEATURES := object-store,otel,tls
test-features: setup
	FEATURES=$(FEATURES) tests/run.sh features

# Every device, behind its real transport, against CASES random drivers each, with overflow checks. A finding is printed with
# the shortest driver that shows it, and kept in proptest-regressions/ for `make test`; SEED=N makes a run repeatable.
fuzz: setup
	PROPTEST_CASES=$(CASES) $(if $(SEED),PROPTEST_RNG_SEED=$(SEED)) cargo test --locked --lib no_driver

# Every fuzz target of fuzz/ for SECONDS each, with ASan: files, requests, peers, devices, guest instructions. Needs nightly
# and cargo-fuzz; see docs/fuzzing.md. TARGETS="profile plan" picks, SEED=N repeats the choices.
fuzz-all:
	FUZZ_SEED=$(SEED) fuzz/run.sh $(SECONDS) $(TARGETS)

# Licences and sources of the dependencies, and advisories if their database can be had; see deny.toml.
deny:
	@resources/deny.sh

# The dependencies of all features as a CycloneDX document.
sbom:
	@cargo cyclonedx --version >/dev/null 2>&1 || { echo "Cannot write the SBOM: cargo-cyclonedx is not installed. \
	Install it: cargo install --locked cargo-cyclonedx" >&2; exit 2; }
	cargo cyclonedx --format json --all-features --target $(TARGET) --override-filename tvmm.cdx
	mkdir -p target && mv tvmm.cdx.json target/tvmm.cdx.json
	@echo "wrote target/tvmm.cdx.json"

# The seccomp filters against the calls that the integration tests make: a call without a rule ends its process, and so
# fails its test; a rule without a call is listed. TESTS="restore:: smp::" picks, to see single calls.
SECCOMP_TRACE := $(CURDIR)/target/seccomp-trace
seccomp-trace: setup
	cargo build --locked --target $(TARGET) --example seccomp-trace --bin tvmm
	rm -rf $(SECCOMP_TRACE) && mkdir -p $(SECCOMP_TRACE)
	TVMM_TRACED=$(CURDIR)/target/$(TARGET)/debug/tvmm TVMM_TRACE_DIR=$(SECCOMP_TRACE) \
		TVMM_BINARY=$(CURDIR)/target/$(TARGET)/debug/examples/seccomp-trace \
		cargo test --locked --target $(TARGET) --test integration -- $(TESTS)
	env -u TVMM_TRACED target/$(TARGET)/debug/examples/seccomp-trace compare resources/seccomp/x86_64.json $(SECCOMP_TRACE)

# Random operations with kill -9, full disks and failing disks against a model, for SECONDS. The seed is printed; SEED=N
# repeats its sequence. A violation names the directory with the evidence.
soak: build
	TVMM_BINARY=$(CURDIR)/$(BINARY) TVMM_SOAK_SECONDS=$(SECONDS) $(if $(SEED),TVMM_SOAK_SEED=$(SEED)) cargo test --locked \
		--test integration -- --ignored --exact --nocapture soak::random_operations_for_a_while

# The long form of tests that are short in `make test`: KILLS times kill -9 in each operation of a VM's life, REWINDS rewinds,
# STANDBY VMs that stand by in a control group with little memory, MOMENTS requests at random moments of demotions and of
# the steps of idle VMs. Their seed is printed; SEED=N repeats the sequence.
endure: build
	TVMM_BINARY=$(CURDIR)/$(BINARY) TVMM_KILLS=$(KILLS) TVMM_REWINDS=$(REWINDS) TVMM_STANDBY=$(STANDBY) \
		TVMM_MOMENTS=$(MOMENTS) $(if $(SEED),TVMM_MOMENTS_SEED=$(SEED)) cargo test --locked --test integration -- --nocapture \
		lifecycle::kills lifecycle::rewind::many_rewinds lifecycle::moments services::serve_memory services::serve_moments

lint: setup
	cargo fmt --check
	cargo fmt --check --manifest-path resources/guest/Cargo.toml
	cargo fmt --check --manifest-path resources/agent/Cargo.toml
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features $(FEATURES) -- -D warnings
	cargo clippy --locked --manifest-path resources/guest/Cargo.toml --target-dir target/guest-tests -- -D warnings
	cargo clippy --locked --features functions --manifest-path resources/guest/Cargo.toml --target-dir target/guest-tests -- -D warnings
	cargo clippy --locked --manifest-path resources/agent/Cargo.toml --target-dir target/agent -- -D warnings

setup:
	@resources/setup.sh

install: build
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/tvmm

# tvmm serve as a service of systemd (docs/serve.md). `systemctl enable --now tvmm` then starts it.
install-service: install
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' resources/systemd/tvmm.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/tvmm.service
	install -D -m 0644 resources/systemd/60-tvmm.rules $(DESTDIR)/etc/udev/rules.d/60-tvmm.rules
	install -D -m 0644 resources/systemd/tvmm.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/tvmm.conf

bench: build
	$(BINARY) bench grid

# The integration tests inside an emulated host with kvm_amd; see tests/testbed/README.md. TESTS="restore:: smp::" picks.
testbed: testbed-build agent
	@resources/setup.sh --build-only
	$(BUILD)
	tests/testbed/integration.sh $(BINARY) $(TESTS)

# Two emulated hosts on one pool.
testbed-hosts: testbed-build
	@resources/setup.sh --build-only
	$(BUILD)
	tests/testbed/hosts.sh $(BINARY)

# The tests of RDMA there, on soft-RoCE, with a binary that has it. Needs CMake.
testbed-rdma: testbed-build agent
	@resources/setup.sh --build-only
	cargo build --release --locked --features rdma
	tests/testbed/rdma.sh target/release/tvmm

testbed-build:
	@tests/testbed/build.sh

# Guests to boot: a small Linux kernel and a root image with Python, in target/linux/; see docs/linux-guests.md. Built from
# Debian packages when somebody asks for them, never by `make test`; the integration tests use them when they are there.
linux-kernel:
	@resources/linux/build-kernel.sh

linux-rootfs: agent
	@resources/linux/build-rootfs.sh
