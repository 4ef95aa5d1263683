# The two commands are `make playground` and `make test`.

CARGO   ?= cargo
PROFILE ?= release
BIN      = target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))

.PHONY: playground test build check tools sim mutants powercut soak deb apt-repo test-hosts clean help

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

playground: build ## builds, starts three nodes, opens the shell (or runs the SQL on standard input)
	@$(BIN)/resqlite playground $(ARGS)

test: tools build ## installs what the tests need, runs everything
	$(CARGO) test --profile $(PROFILE) --workspace

build: ## the three programs
	@$(CARGO) build --profile $(PROFILE) --workspace --bins </dev/null

check: ## formatting and lints, as CI sees them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --profile $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --profile $(PROFILE) --workspace --no-deps --document-private-items

tools: ## what the tests need beside Rust: sqlite3, strace, a Python with grpcio
	@tests/install-tools

SEEDS ?= 1000
sim: ## simulates SEEDS histories of whole clusters under faults (seed=17 in ARGS and SEEDS=1: that one)
	@$(CARGO) run --quiet --profile $(PROFILE) -p sim -- seeds=$(SEEDS) $(ARGS)

mutants: ## seeds bugs, one at a time, and shows that a test fails for each (ARGS: parts of names)
	@tests/mutants/run $(ARGS)

MINUTES ?= 30
soak: build ## three nodes under load and faults for MINUTES: fails if memory or file descriptors grow
	@tests/soak --minutes $(MINUTES) --bin $(BIN)

ROUNDS ?= 200
powercut: tools build ## cuts the power ROUNDS times under load (SEED=17: as that run did); needs root
	@ROUNDS=$(ROUNDS) SEED=$(SEED) $(CARGO) test --profile $(PROFILE) -p resqlite --test powercut -- --nocapture

deb: ## the Debian package, into target/deb
	@packaging/build-deb

apt-repo: deb ## a signed apt repository with it, in target/apt
	@packaging/build-apt-repo

test-hosts: ## installs, deploys, breaks and upgrades it on Debian hosts in namespaces (needs root)
	@tests/hosts/run

clean: ## removes what was built
	$(CARGO) clean
