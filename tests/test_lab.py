# SPDX-License-Identifier: MIT
"""The lab itself: what tests rely on, and that nothing of it stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time

import dns.message
import dns.query
import dns.rcode
import pytest
from lab import Lab
from lab import image
from lab.cleanup import Run, reap, runs, start_time
from lab.network import inside
from lab.shell import CommandFailed, LabError, WaitTimeout, wait_for

NOWHERE = "192.0.2.1"  # RFC 5737


@pytest.fixture(scope="module")
def host(lab):
    """A plain machine."""
    made = lab.host("plain", 24, names=("plain.example",))
    yield made
    lab.remove(made)


def ask(lab, name, kind):
    """One query from the client to the lab's name server."""
    with lab.at_client():
        return dns.query.udp(dns.message.make_query(name, kind), lab.dns.address, timeout=5)


def test_two_hosts_reach_each_other_and_nothing_else(lab, host):
    other = lab.host("other", 25)
    try:
        for address in (other.namespace.ipv4, other.namespace.ipv6):
            with inside(host.namespace), socket.create_server(("", 0)) as unused:
                assert unused.getsockname()[1]  # the namespace is usable from this thread
            route = host.sh(f"ip route get {address}").out
            assert "dev host0" in route
        with inside(other.namespace), socket.create_server((other.address, 7000)):
            with inside(host.namespace):
                socket.create_connection((other.address, 7000), 5).close()
        with inside(host.namespace), pytest.raises(OSError, match="unreachable"):
            socket.create_connection((NOWHERE, 80), 5)
    finally:
        lab.remove(other)


def test_a_name_that_was_set_is_answered_and_all_others_do_not_exist(lab, host):
    answer = ask(lab, "plain.example", "A")
    assert answer.answer[0][0].to_text() == host.address
    begin = time.monotonic()
    assert ask(lab, "nobody.example", "A").rcode() == dns.rcode.NXDOMAIN
    assert time.monotonic() - begin < 1


def test_a_host_is_a_machine_of_its_own(host):
    assert host.read("/etc/hostname") == "plain\n"
    assert len(host.read("/etc/machine-id")) == 33
    assert host.exec("systemctl", "is-system-running").out == "running\n"
    assert host.memory()["init.scope"] > 1


def test_a_command_that_hangs_is_ended_inside_too(host):
    with pytest.raises(CommandFailed, match="no end within"):
        host.exec("sleep", "1234", timeout=0.5)
    wait_for(lambda: "sleep 1234" not in host.sh("ps -eo args").out, 5)


def test_a_line_of_the_log_is_waited_for(host):
    since = time.time()
    host.exec("logger", "-t", "lab", "first", check=False)
    host.sh("systemd-run -q --unit=lab-says echo seen-by-the-lab")
    assert "seen-by-the-lab" in host.wait_log("^seen-by-the-lab", since)
    with pytest.raises(LabError, match="seen-by-the-lab"):
        host.wait_log("^never-said$", since, timeout=0.5)


def test_restore_brings_back_what_a_snapshot_held(host):
    host.write("/etc/kept", "before\n")
    host.power_off()
    snapshot = host.snapshot("kept")
    host.start()
    host.sh("rm /etc/kept; touch /etc/new")
    host.restore(snapshot)
    assert host.read("/etc/kept") == "before\n"
    assert not host.exec("test", "-e", "/etc/new", check=False).ok


def test_a_host_survives_a_power_failure(host):
    host.write("/etc/written", "yes\n")
    host.kill()
    host.start()
    assert host.read("/etc/written") == "yes\n"


def test_apt_refuses_a_repository_that_another_key_signed(host):
    wrong = "/usr/share/keyrings/debian-archive-keyring.gpg"
    right = f"/usr/share/keyrings/{image.KEYRING_NAME}"
    host.write("/etc/apt/sources.list.d/chatmail.sources", image.SOURCES.replace(right, wrong))
    done = host.exec("sh", "-c", f"{image.UPDATE} 2>&1", check=False)
    assert not done.ok and "not signed" in done.out
    host.sh(f"cp {image.INSIDE_REPO}/{image.KEYRING_NAME} {right}")
    host.write("/etc/apt/sources.list.d/chatmail.sources", image.SOURCES)
    host.sh(image.UPDATE)


def test_a_condition_that_stays_false_fails_with_its_last_value():
    with pytest.raises(WaitTimeout, match="never: .* last: 0"):
        wait_for(lambda: 0, 0.05, "never")


def test_two_labs_do_not_disturb_each_other(lab, host):
    with Lab("second") as second:
        twin = second.host("plain", 24)
        assert twin.address == host.address
        assert host.exec("true").ok and twin.exec("true").ok
    assert host.exec("true").ok


def test_what_is_left_running_turns_the_run_red_and_is_removed():
    forgetful = Lab("forgetful")
    command = ["nsenter", f"--net={forgetful.client.path}", "sleep", "1000"]
    forgotten = subprocess.Popen(command, start_new_session=True)
    wait_for(lambda: forgotten.pid in forgetful.state.processes(), 5)
    with pytest.raises(LabError, match="sleep 1000"):
        forgetful.close()
    assert forgotten.wait(5) == -signal.SIGKILL
    assert forgetful.state.leftovers() == []


KILLED = """
import os, signal
from lab import Lab
lab = Lab("killed")
lab.host("victim", 30)
print(lab.state.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_removes_what_a_killed_one_left(lab):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (stale,) = [run for run in runs() if run.id == done.stdout.strip()]
    kinds = {line.split()[0] for line in stale.leftovers()}
    assert {"process", "mount", "network", "cgroup"} <= kinds
    reap()
    assert stale.leftovers() == []
    assert not stale.directory.exists()
    assert lab.state.directory.exists()  # this run's owner is alive


def test_a_process_that_got_a_recorded_number_later_is_not_killed(tmp_path):
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        state = Run(tmp_path / "ffff")
        state.directory.mkdir()
        state.record("pid", f"{bystander.pid} {int(start_time(bystander.pid) or 0) - 1}")
        state.destroy()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_two_hosts_never_share_a_name_or_an_address(lab, host):
    for name, number in ((host.name, 26), ("another", 24)):
        with pytest.raises(LabError, match="in use"):
            lab.place(name, number)
