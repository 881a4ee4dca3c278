"""Only names that root chose are believed; the rest of a cgroup path is the tenant's own."""

from __future__ import annotations

import pytest

from cgpu_agent.rpc.cgroups import NO_NAMES, TrustedNames, cgroup2_mount, cgroup2_path, owner_in, trusted_names

ID = "0123456789abcdef" * 4
OTHER = "f" * 64


def names(path: str, *, delegated: str | None = None, missing: str | None = None) -> TrustedNames:
    """Judge a path whose directories are root's, down to ``delegated``, which belongs to uid 1000."""

    def owner_of(directory: str) -> int | None:
        if missing is not None and directory.startswith(missing):
            return None
        return 1000 if delegated is not None and directory.startswith(delegated) else 0

    return trusted_names(path, owner_of)


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/", None),
        ("/init.scope", "init.scope"),
        ("/system.slice/x.service", "x.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/x.service/payload", "x.service"),
        ("/system.slice/x.service/y.service", "x.service"),
        ("/system.slice", None),
        ("/job/x.service", None),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
    ],
)
def test_the_unit_is_the_first_component_behind_the_slices(path: str, unit: str | None) -> None:
    assert names(path) == TrustedNames(path, unit, None)


def test_a_users_own_units_are_not_named() -> None:
    manager = "/user.slice/user-1000.slice/user@1000.service"
    assert names(f"{manager}/app.slice/sshd.service", delegated=manager) == TrustedNames(
        manager, "user@1000.service", None
    )


def test_a_delegated_service_keeps_its_own_name_only() -> None:
    service = "/system.slice/x.service"
    path = f"{service}/docker-{ID}.scope/cgpu-agent.service"
    assert names(path, delegated=service) == TrustedNames(service, "x.service", None)


def test_a_container_named_below_a_delegated_directory_is_none() -> None:
    assert names(f"/mine/docker-{ID}.scope", delegated="/mine") == TrustedNames("/mine", None, None)


@pytest.mark.parametrize("runtime", ["docker", "cri-containerd", "crio", "libpod"])
def test_a_scope_of_a_known_runtime_is_a_container(runtime: str) -> None:
    scope = f"{runtime}-{ID}.scope"
    assert names(f"/machine.slice/{scope}") == TrustedNames(f"/machine.slice/{scope}", scope, ID)


@pytest.mark.parametrize(
    "path", [f"/docker/{ID}", f"/kubepods/burstable/pod7/{ID}", f"/kubepods.slice/kubepods-pod7.slice/{ID}"]
)
def test_a_bare_id_is_a_container_below_docker_and_kubernetes(path: str) -> None:
    assert names(path) == TrustedNames(path, None, ID)


@pytest.mark.parametrize(
    "name",
    [ID, f"docker-{ID[:-1]}.scope", f"docker-{ID.upper()}.scope", f"docker-{ID}.scopes", f"x-docker-{ID}.scope"],
)
def test_nothing_else_is_a_container(name: str) -> None:
    assert names(f"/system.slice/{name}").container is None


def test_what_a_container_makes_below_itself_is_ignored_even_as_root() -> None:
    scope = f"/system.slice/docker-{ID}.scope"
    path = f"{scope}/system.slice/cgpu-agent.service/docker/{OTHER}"
    assert names(path) == TrustedNames(scope, f"docker-{ID}.scope", ID)


def test_a_container_is_not_the_unit_that_started_it() -> None:
    path = f"/system.slice/docker.service/docker/{ID}"
    assert names(path) == TrustedNames(path, None, ID)


def test_a_directory_whose_owner_cannot_be_told_ends_all_belief() -> None:
    assert names("/system.slice/x.service", missing="/system.slice/x.service") == NO_NAMES
    assert names("/system.slice/x.service", missing="/system.slice") == NO_NAMES


@pytest.mark.parametrize(
    "path",
    [
        "",
        "x.service",
        "/../x.service",
        "/../../system.slice/x.service",
        "/system.slice//x.service",
        "/system.slice/x.service/",
        "/./x.service",
        "/system.slice/\udc80.service",
        "/system.slice/\u202e.service",
        "/system.slice/a\tb.service",
        "/a" * 2049,
    ],
)
def test_refuses_paths_that_cannot_be_looked_up(path: str) -> None:
    assert names(path) == NO_NAMES


def test_never_asks_about_directories_below_the_first_foreign_one() -> None:
    asked: list[str] = []

    def owner_of(directory: str) -> int:
        asked.append(directory)
        return 1000 if directory == "/a/b" else 0

    assert trusted_names("/a/b/c/d", owner_of).cgroup == "/a/b"
    assert asked == ["/a", "/a/b"]


def test_reads_the_line_of_the_cgroup2_hierarchy() -> None:
    assert (
        cgroup2_path(b"9:name=systemd:/x\n4:memory:/0::/y\n0::/system.slice/x.service\n") == "/system.slice/x.service"
    )
    assert cgroup2_path(b"9:name=systemd:/x\n") is None
    assert cgroup2_path(b"") is None


UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.mark.parametrize(
    ("mountinfo", "mount"),
    [
        (UNIFIED, "/sys/fs/cgroup"),
        (HYBRID, "/sys/fs/cgroup/unified"),
        ("31 23 0:28 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", None),
        ("31 23 0:28 / /sys/fs/cgroup rw - cgroup cgroup rw,name=cgroup2\n", None),
        ("31 23 0:28 / /odd\\040place rw - cgroup2 cgroup2 rw\n", None),
        ("cgroup2 - cgroup2 \n", None),
        ("", None),
    ],
)
def test_finds_where_the_whole_cgroup2_hierarchy_is_mounted(mountinfo: str, mount: str | None) -> None:
    assert cgroup2_mount(mountinfo) == mount


def test_asks_the_file_system_who_owns_a_directory(tmp_path: object) -> None:
    owner_of = owner_in(str(tmp_path))
    assert owner_of("") is not None
    assert owner_of("/missing") is None
