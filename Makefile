# Atoll: build, run and test. `make help` lists the targets.
#
# Everything is built from source by Go; the only things taken from the
# distribution are the packages that deploy/deps.sh names.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

GO ?= go
# A tagged commit is a release and says so; everything else is the version
# under development. The commit is left out on purpose: it would relink some
# 400 MB of binaries at each commit.
VERSION ?= $(shell git describe --tags --exact-match 2>/dev/null || echo v0.1.0-dev)
KUBE    := v1.36.3
CRITOOLS := v1.36.0
GOVC   := v0.55.0

# What `kubectl version` and the Node's kubeletVersion report.
KUBE_STAMP := $(KUBE)+atoll.$(patsubst v%,%,$(VERSION))
stamp = -X $(1).gitVersion=$(KUBE_STAMP) -X $(1).gitMajor=1 -X $(1).gitMinor=36 -X $(1).gitTreeState=clean -X $(1).gitCommit=
LDFLAGS := -s -w -X github.com/openatoll/atoll/internal/version.Version=$(VERSION) \
	$(call stamp,k8s.io/component-base/version) $(call stamp,k8s.io/client-go/pkg/version)
# No further flags: builds and tests share one set of cached packages, and
# Kubernetes alone is eight CPU-minutes of them.
GOBUILD := $(GO) build -buildvcs=false

DATA_DIR ?= /var/lib/atoll
UP_FLAGS ?=
DOWN_FLAGS ?=

.PHONY: help deps build up down test test-deps test-unit test-suites test-e2e test-e2e-idle critest e2e-storage crash crash-volumes crash-matrix fuzz bench bench-density bench-kvm bench-compare bench-save lint guest guest-kernel guest-crun \
	images generate fmt clean leftovers man \
	bin/atoll bin/atoll-namespaces bin/spherelet bin/podinit bin/kubectl bin/kubectl-atoll bin/kubelet bin/crictl bin/govc

help: ## list the targets
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

deps: ## install what is needed from Debian (quick when it is there)
	@deploy/deps.sh

build: bin/atoll bin/atoll-namespaces bin/spherelet bin/kubectl bin/kubectl-atoll bin/crictl bin/govc guest images ## build binaries, guest and demo images

# Go's own build cache decides what is stale.
bin/atoll bin/atoll-namespaces bin/spherelet bin/kubectl-atoll:
	@$(GOBUILD) -ldflags '$(LDFLAGS)' -o $@ ./cmd/$(@F)
bin/podinit: # runs as PID 1 of the guest, where there is no libc
	@CGO_ENABLED=0 $(GOBUILD) -ldflags '$(LDFLAGS)' -o $@ ./cmd/podinit
bin/kubectl:
	@$(GOBUILD) -ldflags '$(LDFLAGS)' -o $@ k8s.io/kubernetes/cmd/kubectl
bin/kubelet: # upstream's, unchanged: the tests run it beside our runtime
	@$(GOBUILD) -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=$(KUBE) -X k8s.io/client-go/pkg/version.gitVersion=$(KUBE)' -o $@ k8s.io/kubernetes/cmd/kubelet
bin/govc:
	@$(GOBUILD) -ldflags '-s -w -X github.com/vmware/govmomi/cli/flags.BuildVersion=$(GOVC)' -o $@ ./cmd/govc
bin/crictl:
	@$(GOBUILD) -ldflags '-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$(CRITOOLS)' -o $@ sigs.k8s.io/cri-tools/cmd/crictl

# A static crun takes a third to half the CPU time (docs/decisions/0001). Where
# its source cannot be had, the distribution's serves; it is not tried at each make.
guest: bin/podinit ## kernel and initramfs of the pod VMs, into build/guest
	@vmpod/guestimage/crun/build.sh --once build/guest-crun
	@$(GO) run ./cmd/mkguest -out build/guest -podinit bin/podinit

guest-kernel: ## the tuned guest kernel, from Debian's linux-source (13 CPU-minutes, once)
	@DEPS=kernel deploy/deps.sh
	@vmpod/guestimage/kernel/build.sh build/guest-kernel
	@$(MAKE) guest

guest-crun: ## the guest's static crun anew, where `make guest` could not have it
	@vmpod/guestimage/crun/build.sh build/guest-crun
	@$(MAKE) guest

images: ## demo images of the embedded registry, into build/images
	@$(GO) run ./cmd/mkimages -out build/images

up: deps build ## bring the cluster up (DATA_DIR=…, UP_FLAGS=--isolated)
	@bin/atoll up --data-dir $(DATA_DIR) $(UP_FLAGS)

down: bin/atoll ## stop the cluster (DOWN_FLAGS=--purge also erases the data)
	@bin/atoll down --data-dir $(DATA_DIR) $(DOWN_FLAGS)

leftovers: bin/atoll ## list what Atoll left on this machine; fails unless nothing
	@bin/atoll leftovers

test: test-deps ## lint, unit tests, VM suites, end-to-end tests
	@$(MAKE) -j2 build bin/kubelet bin/golangci-lint bin/csi-sanity
	@$(GO) run ./internal/testsum lint unit suites e2e
test-deps:
	@DEPS=test deploy/deps.sh
test-unit: ## unit tests, with the race detector where it is affordable
	@$(GO) run ./internal/testsum unit
test-suites: build bin/csi-sanity ## driver, network and disk suites, which boot VMs
	@$(GO) run ./internal/testsum suites
test-e2e: build bin/kubelet ## scripts that drive a cluster as a user would
	@$(GO) run ./internal/testsum e2e
test-e2e-idle: build ## exec, attach and port-forward, used again after IDLE=10m of silence
	@ATOLL_IDLE=$(or $(IDLE),10m) $(GO) test ./e2e -count=1 -timeout=60m -run '^TestScripts$$/^idle$$' -v
lint: bin/golangci-lint ## gofmt, go vet, golangci-lint
	@$(GO) run ./internal/testsum lint

bench: build ## measure; prints a table, writes build/bench.json
	@$(GO) run ./cmd/bench -out build/bench.json
bench-density: build ## how many pods this host holds, up to 200; adds to build/bench.json
	@$(GO) run ./cmd/bench -only density -add -out build/bench.json
bench-kvm: build ## the same, where KVM is usable; writes build/bench-kvm.json, to be sent back
	@$(GO) run ./cmd/bench -kvm -out build/bench-kvm.json
	@$(GO) run ./cmd/bench -kvm -only density -add -out build/bench-kvm.json
bench-compare: ## what has changed since the last committed run (docs/bench); fails if it is worse
	@$(GO) run ./cmd/bench -compare -out build/bench.json
bench-save: ## put the run into docs/bench, to be committed
	@$(GO) run ./cmd/bench -save -out build/bench.json

FUZZTIME ?= 60s
fuzz: ## native Go fuzzing of RPCs, images, guests and monitors (FUZZTIME=60s a target, FUZZ=regexp of targets)
	@grep -rlE '^func Fuzz' --include=*_test.go cri storage vmpod | sort | while read -r file; do \
		for target in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9]*)\(.*/\1/p' "$$file"); do \
			[[ $$target =~ $(or $(FUZZ),.) ]] || continue; \
			echo "=== $$target ($$(dirname "$$file"))"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x -parallel 1 "./$$(dirname "$$file")" </dev/null; \
		done; done

critest: bin/spherelet guest ## upstream's CRI suite against the runtime alone; writes build/critest.json (FOCUS=…)
	@DEPS=critest deploy/deps.sh
	@$(GO) run ./e2e/critest -table docs/critest.md $(if $(FOCUS),-focus '$(FOCUS)')

e2e-storage: build ## upstream's external storage suite, 20 minutes when emulated on 2 CPUs; writes docs/e2e-storage.md (FOCUS=…, CONTINUE=1 adds what has no result, TIMEOUT=3h)
	@$(GO) run ./e2e/storage -table docs/e2e-storage.md $(if $(FOCUS),-focus '$(FOCUS)') $(if $(CONTINUE),-continue) $(if $(TIMEOUT),-timeout $(TIMEOUT))

crash: build ## kill spherelet 100 times while pods run (25 min at most); writes docs/crash.md, build/crash.json
	@$(GO) run ./e2e/crash -table docs/crash.md

crash-volumes: build ## kill pods, spherelets, QEMUs and a node for FOR=10m while volumes are written; writes docs/crash-volumes.md, build/crash-volumes.json
	@$(GO) run ./e2e/crash volumes -for $(or $(FOR),10m) -table docs/crash-volumes.md

crash-matrix: guest ## kill spherelet at every failpoint, on real VMs; writes docs/crash-matrix.md
	@$(GO) test ./e2e/crashmatrix -count=1 -timeout=60m -run '^TestCrashMatrix$$' -v -full -table $(CURDIR)/docs/crash-matrix.md

# golangci-lint is not packaged by Debian. Its own module pins its version.
bin/golangci-lint: tools/go.mod tools/go.sum
	@echo "building golangci-lint (once)"
	@cd tools && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

# The CSI project's suite speaks a newer CSI than the kubelet can link: its own
# module, too.
bin/csi-sanity: tools/csi-sanity/go.mod tools/csi-sanity/go.sum
	@cd tools/csi-sanity && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o ../../$@ github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity

generate: ## run the code generators
	@DEPS=generate deploy/deps.sh
	@$(GO) generate ./...

fmt: ## gofmt all files
	@gofmt -s -w $$(git ls-files --cached --others --exclude-standard '*.go')

man: bin/atoll bin/kubectl-atoll ## man pages, into build/man
	@bin/atoll man build/man
	@bin/kubectl-atoll man build/man

clean: ## remove what was built (Go's caches stay)
	@rm -rf bin build
