# usernet. Everything is built by the Go tool; the targets only name the usual things to do.

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO      ?= go
# Strict: a test that would be skipped because the machine lacks something fails instead.
export USERNET_TEST_STRICT
export USERNET_TEST_CACHE
# Where make demo shows what it shows: docker, none. Without it: on Docker if it is there.
export ENGINE
# Where the gateway of virtual machines runs besides Linux.
GATEWAYS := darwin/arm64 windows/amd64

.PHONY: build test lint unit engines demo bench plugin setup clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/usernet ./cmd/usernet

# Everything, on a Debian machine as root. It installs what it needs and leaves the machine's network alone.
test: setup lint unit engines

setup:
	test/setup.sh

lint:
	@files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "gofmt -l: $$files"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	@for system in $(GATEWAYS); do \
		echo "vet and build for $$system"; \
		export CGO_ENABLED=0 GOOS=$${system%/*} GOARCH=$${system#*/}; \
		ours=$$($(GO) list -deps -f '{{with .Module}}{{if .Main}}{{$$.ImportPath}}{{end}}{{end}}' ./cmd/usernet) && \
		$(GO) vet $$ours && $(GO) build -o /dev/null ./cmd/usernet || exit 1; \
	done

# The race detector makes sync.Pool drop things and has its own idea of whose turn it is: tests that count allocations and
# bytes do without it.
unit:
	$(GO) test -race $$($(GO) list ./... | grep -v /test/)
	$(GO) test -run 'Alloc|SteadyState|Fairness' ./portmap ./usermode/...

# Real engines, one at a time a package. USERNET_TEST_ENGINES=docker28 runs one of them only.
engines:
	$(GO) test -p 1 -v -timeout 40m ./test/...

demo: build
	test/demo.sh

bench: build
	test/bench.sh $(ARGS)

plugin:
	dist/plugin.sh

clean:
	rm -rf bin plugin
