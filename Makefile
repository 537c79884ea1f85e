# Posthouse. `make` builds, vets and tests; `make help` lists the rest.
SHELL := /bin/bash
GO    ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: all build demo test prove sim sim-deciders sim-scenarios posthouse-sim race fuzz lint bench bench-engines mutants help clean tools

all: build lint test ## build, check and test

build: ## bin/posthouse, one static binary
	@$(GO) version | awk '{split(substr($$3,3),v,"."); if (v[1]<1 || (v[1]==1 && (v[2]<26 || (v[2]==26 && v[3]<3)))) {print "posthouse needs Go 1.26.3 or newer (Debian 12 ships an older one: https://go.dev/dl); this is " $$3; exit 1}}'
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/posthouse ./cmd/posthouse

demo: build ## three offices, people and a small outside world on this machine; Ctrl-C ends it
	@bin/posthouse demo up

test: tools ## every test; installs the Debian packages that they need when run as root
	$(GO) test -timeout 14m ./...

prove: tools ## the promises in full: every crash point, then on real processes every power cut, flip and kill (an hour; as root)
	PROVE=full $(GO) test -count=1 -v -timeout 60m -run EveryDiskOperation ./simtest/deciders
	PROVE=full $(GO) test -count=1 -v -timeout 180m ./simtest/processes

MINUTES ?= 10
FROM    ?= 1
SEEDS   ?=
sim-deciders: ## days of the deciders alone, bit for bit: SEEDS of them from seed FROM, else for MINUTES
	$(GO) test ./simtest/deciders -count=1 -v -run 'TestDays$$' -timeout 24h -args $(if $(SEEDS),-seeds $(SEEDS),-minutes $(MINUTES)) -from $(FROM)

sim: sim-deciders posthouse-sim ## the deciders, then whole nodes in virtual time: random faults and load from seed FROM for MINUTES, then an office away for 25 hours and 8 days
	@bin/posthouse-sim random --minutes $(MINUTES) --seed $(FROM) --length 2h
	@bin/posthouse-sim run a-week-away

sim-scenarios: posthouse-sim ## every scenario that ships in full, days and weeks of them: over an hour
	@set -e; for s in simtest/scenario/shipped/*.toml; do bin/posthouse-sim run $$s; done

posthouse-sim: ## bin/posthouse-sim, the simulator for people: bin/posthouse-sim help
	$(GO) test -c -o bin/posthouse-sim ./simtest/command

race: ## the tests under the race detector
	$(GO) test -race -timeout 60m $$($(GO) list ./... | grep -v simtest/processes) # there the nodes are other programs

FUZZTIME ?= 30s
fuzz: ## every fuzz target, FUZZTIME each
	@set -e; for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p 2>/dev/null | grep '^Fuzz' || true); do \
	    echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$p; done; done

lint: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo 'gofmt -w these:'; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

bench: ## what real nodes do on this machine, in about two minutes
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 15m ./simtest/bench

bench-engines: ## benchmarks of the engines, one by one
	$(GO) test -run '^$$' -bench . -benchmem $$($(GO) list ./... | grep -v simtest/bench)

mutants: ## every mutant must be caught by its test
	@.ci/mutants

tools:
	@.ci/tools

clean: ## remove what was built
	rm -rf bin

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
