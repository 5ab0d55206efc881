# SPDX-License-Identifier: MIT
# The commands people type; .ci/run calls them. All need root: trees, namespaces, containers.
REPO_URI ?=
VERSION ?=
BENCH ?=

.PHONY: help deb repo release lint test test-load bench demo demo-stop clean distclean

help:
	@echo "sudo make demo       build all, boot a Debian 13 container, install the relay in it"
	@echo "sudo make demo-stop  remove that container"
	@echo "sudo make test       everything: build, unit tests, lint, repository, containers"
	@echo "sudo make test-load  10,000 sessions, storms, floods, 1 GB of memory; half an hour"
	@echo "sudo make bench      what mail, logins, clean-up cost; writes docs/benchmarks.md (BENCH=names)"
	@echo "sudo make deb        the packages, in build/debs"
	@echo "sudo make repo       the signed apt repository, in build/repo (REPO_URI=where it will be)"
	@echo "sudo make release    version, changelog, a repository that keeps several (VERSION= REPO_URI=)"
	@echo "sudo make lint       lintian, shellcheck, ruff, mypy"
	@echo "make clean           remove build/; distclean: the cache as well"

deb: tools/.host-packages
	tools/build deb

repo: tools/.host-packages
	tools/build repo $(REPO_URI)

release: tools/.host-packages
	tools/release --uri "$(REPO_URI)" $(VERSION)

lint: tools/.host-packages
	tools/lint

test: tools/.host-packages
	tools/run-tests

test-load: repo
	tools/test-load

bench: repo
	tools/bench --document $(BENCH)

demo: tools/.host-packages
	tools/demo start

demo-stop:
	tools/demo stop

# what the host itself needs; everything else happens in trees and containers
.PHONY: tools/.host-packages
tools/.host-packages:
	@tools/host-packages

clean:
	rm -rf build

distclean: clean
	rm -rf "$${CHATMAIL_CACHE:-/var/cache/chatmail-relay-build}"
