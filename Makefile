# "make help" lists every target; the two that matter are "make demo" and "make test".
.DEFAULT_GOAL := help
.PHONY: help demo demo-stop test check dev lint types imports fresh units man fmt generate bench bench-gpu transfer-sweep campaign kills restarts hostile-host soak install install-vm install-verifier uninstall deb test-systemd test-vm test-gpu dist clean

PYTHON ?= python3
BIN := .venv/bin
PREFIX ?= /usr
DESTDIR ?=
MUTANTS ?= 100000
KILLS ?= 500
N ?= 100000
TIB ?= 1
SECONDS ?= 600
SOURCES := agent tests packaging

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: ## run the whole agent on this machine: no TPM, GPU or cloud needed
	@PYTHON=$(PYTHON) sh packaging/demo/demo.sh start

demo-stop: ## end the demo and remove what it made
	@sh packaging/demo/demo.sh stop

test: dev ## all tests, from nothing
	$(BIN)/python -m pytest

check: dev lint types imports fresh units ## every gate but the tests

dev: ## install what tests and gates need (Debian packages, .venv)
	@PYTHON=$(PYTHON) sh packaging/bootstrap.sh dev

lint: dev ## style: ruff, shellcheck
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	shellcheck packaging/*.sh packaging/demo/*.sh packaging/deb/*.sh packaging/deb/postinst packaging/deb/prerm packaging/deb/postrm tests/vm/guest/vm-payload .ci/run

types: dev ## mypy --strict
	$(BIN)/mypy

imports: dev ## the floors: imports only point down
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

fresh: dev ## generated stubs are those of the protos
	sh packaging/generate.sh --check

units: dev ## systemd units and man pages
	$(BIN)/python -m pytest -q tests/lint

fmt: dev ## format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

generate: ## generate the gRPC stubs from protos/
	sh packaging/generate.sh

test-systemd: dev $(if $(filter-out bookworm,$(SUITE)),dist,deb) ## the package installed, and its units at work, under a real systemd in a container (root; SUITE=trixie: Debian 13, by pip)
	@PYTHON=/usr/bin/python3 sh packaging/bootstrap.sh systemd
	$(BIN)/python -m pytest --timeout 0 tests/systemd

test-vm: dev deb ## measured boots of the agent in QEMU with Secure Boot and a TPM: about 13 minutes (root)
	@PYTHON=/usr/bin/python3 sh packaging/bootstrap.sh vm
	$(BIN)/python -m pytest --timeout 0 -s tests/vm/measured_boot.py

test-gpu: dev ## CUDA, NVML and errors of an NVIDIA GPU that is at hand; skipped without one
	$(BIN)/python -m pytest tests/metal

bench: dev ## measure; ratios on the terminal, numbers in build/bench.json
	$(BIN)/python tests/bench/bench.py

bench-gpu: dev ## the way to an NVIDIA GPU's memory beside CUDA alone
	$(BIN)/python tests/bench/metal.py

transfer-sweep: dev ## speed of transfers by size and number of slots, a model; plot in build/transfer-sweep.svg
	$(BIN)/python tests/bench/sweep.py

campaign: dev ## 100,000 mutants of evidence bundles, none may be accepted (MUTANTS=n), and every flipped byte of GPU reports
	cd tests && ../$(BIN)/python -m fuzz.campaign --mutants $(MUTANTS)
	HYPOTHESIS_PROFILE=campaign $(BIN)/python -m pytest tests/fuzz

kills: dev ## 500 times kill -9 under load: the agent, its TPM, the machine, OpenBao; no key may be lost (KILLS=n, SEED=n)
	cd tests && ../$(BIN)/python -m fixtures.kills --rounds $(KILLS) $(if $(SEED),--seed $(SEED))

restarts: dev ## 100 restarts under load, in order and by kill -9; no lease may be lost, no call fail for good (N=n, SEED=n)
	cd tests && ../$(BIN)/python -m fixtures.restarts $(if $(filter command line,$(origin N)),--rounds $(N)) $(if $(SEED),--seed $(SEED))

hostile-host: dev ## 100,000 interferences with encrypted transfers (N=n), none may be accepted
	INTERFERENCES=$(N) $(BIN)/python -m pytest --timeout 0 tests/attacks/test_transfer_host.py

soak: dev ## up to 1 TiB of transfers in at most 600 seconds, after which memory must be what it was (TIB=n, SECONDS=n)
	cd tests && ../$(BIN)/python -m fixtures.soak --tib $(TIB) --seconds $(SECONDS)

install: install-vm install-verifier ## install units, configuration, policy and man pages (DESTDIR, PREFIX); the package itself by pip

install-vm: ## what of this is for a VM
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system/cgpu-agent.service.d $(DESTDIR)$(PREFIX)/lib/systemd/system/dev-tpmrm0.device.d
	install -m 644 systemd/cgpu-agent.service systemd/cgpu-ready.service systemd/cgpu-egress.service systemd/*.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/
	install -m 644 systemd/cgpu-agent.service.d/*.conf $(DESTDIR)$(PREFIX)/lib/systemd/system/cgpu-agent.service.d/
	install -m 644 systemd/dev-tpmrm0.device.d/*.conf $(DESTDIR)$(PREFIX)/lib/systemd/system/dev-tpmrm0.device.d/
	install -D -m 644 systemd/nvidia-persistenced.service.d/zz-cgpu-agent.conf $(DESTDIR)$(PREFIX)/lib/systemd/system/nvidia-persistenced.service.d/zz-cgpu-agent.conf
	install -D -m 644 systemd/cgpu-agent.sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/cgpu-agent.conf
	install -D -m 644 systemd/cgpu-agent.tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/cgpu-agent.conf
	install -D -m 644 systemd/config.toml $(DESTDIR)/etc/cgpu-agent/config.toml
	install -D -m 644 systemd/egress.toml $(DESTDIR)/etc/cgpu-agent/egress.toml
	install -D -m 644 agent/cgpu_agent/cedar/default.cedar $(DESTDIR)$(PREFIX)/share/cgpu-agent/policy.cedar
	install -D -m 644 docs/man/cgpuctl.1 $(DESTDIR)$(PREFIX)/share/man/man1/cgpuctl.1
	install -D -m 644 docs/man/cgpu-agent.8 $(DESTDIR)$(PREFIX)/share/man/man8/cgpu-agent.8
	install -D -m 644 docs/man/cgpu-egress.8 $(DESTDIR)$(PREFIX)/share/man/man8/cgpu-egress.8
	install -D -m 644 docs/man/cgpu-ready.8 $(DESTDIR)$(PREFIX)/share/man/man8/cgpu-ready.8
	install -D -m 644 docs/man/cgpu-agent.toml.5 $(DESTDIR)$(PREFIX)/share/man/man5/cgpu-agent.toml.5

install-verifier: ## what of this is for a relying party
	install -D -m 644 systemd/cgpu-verifier.service $(DESTDIR)$(PREFIX)/lib/systemd/system/cgpu-verifier.service
	install -D -m 644 systemd/cgpu-verifier.toml $(DESTDIR)/etc/cgpu-verifier/config.toml
	install -D -m 644 docs/man/cgpu-verifier.8 $(DESTDIR)$(PREFIX)/share/man/man8/cgpu-verifier.8

uninstall: ## remove what "install" installed, but the configuration
	rm -rf $(addprefix $(DESTDIR)$(PREFIX)/lib/systemd/system/,cgpu-agent.service cgpu-agent.socket cgpu-agent-admin.socket cgpu-agent-lease.socket cgpu-agent-metrics.socket cgpu-egress.service cgpu-egress.socket cgpu-ready.service cgpu-ready.socket cgpu-verifier.service cgpu-agent.service.d dev-tpmrm0.device.d/50-cgpu-agent.conf nvidia-persistenced.service.d/zz-cgpu-agent.conf)
	rm -f $(DESTDIR)$(PREFIX)/lib/sysusers.d/cgpu-agent.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/cgpu-agent.conf $(DESTDIR)$(PREFIX)/share/cgpu-agent/policy.cedar
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/man/,man1/cgpuctl.1 man8/cgpu-agent.8 man8/cgpu-egress.8 man8/cgpu-ready.8 man8/cgpu-verifier.8 man5/cgpu-agent.toml.5)

deb: ## build the Debian package, dist/*.deb; the same source gives the same bytes
	@PYTHON=/usr/bin/python3 sh packaging/bootstrap.sh deb
	sh packaging/deb/build.sh dist

dist: dev ## build the wheel
	rm -rf build/lib
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean: demo-stop ## remove everything that can be made again
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
