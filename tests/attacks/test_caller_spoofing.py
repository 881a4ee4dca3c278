"""Callers that try to be somebody else, each with a real process against a real server behind the front door."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from cgpu_agent.errors import Denied
from fixtures.cgroups import cgroup, within
from frontdoor_kit import Kit, call, entries, needs_root, until, with_kit

pytestmark = needs_root

NO_IDENTITY = ["UNAUTHENTICATED", "NO_IDENTITY"]


def test_a_caller_is_who_the_kernel_says() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", uid=1234, gid=77, groups=[9, 5], stay=True) as client:
            seen = await client.says()
            assert (seen["uid"], seen["gid"], seen["groups"]) == (1234, 77, [5, 9])
            assert seen["pid"] == client.pid
            assert (seen["alive"], seen["check"]) == (True, "ok")

    with_kit(scenario)


def test_more_groups_than_can_be_read_are_unknown_not_none() -> None:
    async def scenario(kit: Kit) -> None:
        assert (await kit.ask("who", uid=1234, groups=list(range(1000, 1300))))["groups"] is None
        assert (await kit.ask("who", uid=1234, groups=[]))["groups"] == []

    with_kit(scenario)


def test_root_gets_no_identity_past_the_door() -> None:
    async def scenario(kit: Kit) -> None:
        assert await kit.ask("who", to="inner") == NO_IDENTITY
        assert await kit.ask("who", to="inner", bind="\0cgpu-own-name") == NO_IDENTITY

    with_kit(scenario)


def test_others_cannot_reach_the_inner_socket() -> None:
    async def scenario(kit: Kit) -> None:
        assert await kit.ask("raw", to="inner", uid=1234) == "Permission denied"

    with_kit(scenario)


def test_the_name_of_the_callers_own_socket_is_not_read() -> None:
    async def scenario(kit: Kit) -> None:
        kit.root.chmod(0o777)
        assert (await kit.ask("who", uid=1234, bind=str(kit.root / "own")))["uid"] == 1234
        async with kit.client("who", uid=4321, stay=True) as victim:
            await victim.says()
            [name] = live_names(kit)
            assert (await kit.ask("who", uid=1234, bind="\0" + name))["uid"] == 1234

    with_kit(scenario)


def test_a_live_name_can_be_seen_but_not_taken() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", stay=True) as victim:
            await victim.says()
            [live] = live_names(kit)
            assert await kit.ask("names", uid=1234) == [live, "Permission denied"]

    with_kit(scenario)


def test_an_abstract_socket_named_like_a_live_one_has_no_identity() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", stay=True) as victim:
            await victim.says()
            [live] = live_names(kit)
            assert await kit.ask("who", to="inner", bind="\0" + live) == NO_IDENTITY

    with_kit(scenario)


def test_a_dead_name_means_nobody() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", stay=True) as victim:
            await victim.says()
            [dead] = live_names(kit)
        await until(lambda: not live_names(kit))
        assert await kit.ask("who", to="inner", bind=dead) == NO_IDENTITY

    with_kit(scenario)


def test_no_name_stays_in_the_directory() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", stay=True) as client:
            await client.says()
            assert entries(kit.root / "inner") == ["grpc.sock"]

    with_kit(scenario)


@pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode != 0,
    reason="user namespaces cannot be made here",
)
def test_root_of_a_users_own_namespace_is_that_user() -> None:
    async def scenario(kit: Kit) -> None:
        assert (await kit.ask("who", uid=1234, namespace=True))["uid"] == 1234

    with_kit(scenario)


def test_a_caller_in_its_own_pid_and_network_namespace_has_its_outer_pid() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("who", stay=True, wrap=("unshare", "--pid", "--net", "--fork")) as client:
            seen = await client.says()
            assert parent_of(seen["pid"]) == client.pid
            client.go_on()
            await asyncio.to_thread(client.process.wait)

    with_kit(scenario)


def test_changing_uid_after_connecting_gains_nothing_and_fails_the_check() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("change-uid", then=4321) as client:
            assert [(seen["uid"], seen["check"]) for seen in (await client.says(), await client.says())] == [
                (0, "ok"),
                (0, "CALLER_CHANGED"),
            ]

    with_kit(scenario)


def test_changing_uid_before_being_accepted_fails_the_check() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("raw", then=4321) as client:
            await client.says()
            kit.front.start()
            await until(lambda: bool(kit.opened))
            [caller] = kit.opened
            assert caller.caller.uid == 0
            with pytest.raises(Denied) as refused:
                caller.still_the_same()
            assert refused.value.slug == "CALLER_CHANGED"

    with_kit(scenario, opened=False)


def test_another_program_in_the_same_process_fails_the_check() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("exec", uid=1234) as client:
            await client.says()
            await until(lambda: bool(kit.opened))
            [caller] = kit.opened
            caller.still_the_same()
            client.go_on()
            await until(lambda: Path(f"/proc/{client.pid}/comm").read_text() == "sleep\n")
            with pytest.raises(Denied) as refused:
                caller.still_the_same()
            assert refused.value.slug == "CALLER_CHANGED"
            assert caller.alive()

    with_kit(scenario)


@pytest.mark.parametrize("ids", [{"uid": 65534, "gid": 5}, {"uid": 5, "gid": 65534}])
def test_nobody_is_refused(ids: dict[str, int]) -> None:
    async def scenario(kit: Kit) -> None:
        assert await kit.ask("who", **ids) == ["PERMISSION_DENIED", "CALLER_UNIDENTIFIED"]
        assert kit.opened == []
        assert kit.front.stats().unidentified == 1

    with_kit(scenario)


def test_a_caller_has_the_unit_of_its_cgroup() -> None:
    async def scenario(kit: Kit) -> None:
        with cgroup("payload") as group:
            seen = await kit.ask("who", uid=1234, wrap=within(group / "payload"))
            assert (seen["unit"], seen["cgroup"]) == (group.name, f"/{group.name}/payload")

    with_kit(scenario)


def test_names_that_a_tenant_made_in_its_own_subtree_are_ignored() -> None:
    async def scenario(kit: Kit) -> None:
        scope = f"docker-{'a' * 64}.scope"
        with cgroup(scope, "cgpu-agent.service") as group:
            os.chown(group, 1234, 1234)
            seen = await kit.ask("who", uid=1234, wrap=within(group / scope / "cgpu-agent.service"))
            assert (seen["unit"], seen["container"], seen["cgroup"]) == (group.name, None, f"/{group.name}")

    with_kit(scenario)


def test_a_caller_that_moves_to_another_cgroup_fails_the_check() -> None:
    async def scenario(kit: Kit) -> None:
        with cgroup() as group:
            async with kit.client("raw", uid=1234) as client:
                await client.says()
                await until(lambda: bool(kit.opened))
                [caller] = kit.opened
                caller.still_the_same()
                (group / "cgroup.procs").write_text(str(client.pid))
                with pytest.raises(Denied) as refused:
                    caller.still_the_same()
                assert refused.value.slug == "CALLER_CHANGED"

    with_kit(scenario)


def test_the_daemon_reaches_itself_with_its_own_pid() -> None:
    async def scenario(kit: Kit) -> None:
        assert (await call(kit.public, "Who"))["pid"] == os.getpid()

    with_kit(scenario)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def live_names(kit: Kit) -> list[str]:
    """Paths of the door's connections, as the kernel lists them: each once, on the server's half."""
    prefix = str(Path(kit.inner).parent) + "/"
    lines = Path("/proc/net/unix").read_text().splitlines()
    found = {line.split()[-1] for line in lines if prefix in line} - {kit.inner}
    return sorted(found)
