"""``cgpuctl object``: what it writes is whole and verified, or is not there."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cgpu_agent.cli.progress import describe
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.sealed import KEY

PLAIN = os.urandom(3 << 20)
NAME = ["--key-id", "kek-1", "--object-id", "models/one", "--object-version", "2"]


class Objects:
    """A folder with a key, a plaintext and the object made of it."""

    def __init__(self, ctl: Ctl, folder: Path) -> None:
        self.ctl, self.folder = ctl, folder
        self.key = folder / "key"
        self.key.write_bytes(KEY)
        self.key.chmod(0o600)
        self.plain = folder / "plain"
        self.plain.write_bytes(PLAIN)
        self.sealed = folder / "sealed"
        self.opened = folder / "opened"
        assert self("seal", self.plain, self.sealed).code == PASS
        self.before = set(folder.iterdir())

    def __call__(self, verb: str, source: Path | str, target: Path | str, *more: str) -> Ran:
        return self.ctl(*self.command(verb, source, target, *more))

    def command(self, verb: str, source: Path | str, target: Path | str, *more: str) -> list[str]:
        return ["object", verb, "--key-file", str(self.key), *NAME, *more, str(source), str(target)]

    def process(self, *arguments: object, **more: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cgpu_agent.cli.main", *self.command(*arguments)]  # type: ignore[arg-type]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # type: ignore[call-overload, no-any-return]

    def wait_for_most(self) -> None:
        """Until all but the last segment is in a temporary file, and the process waits for the rest."""
        deadline = time.monotonic() + 60
        while self._unfinished() < (3 << 20) - 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._unfinished() >= (3 << 20) - 200

    def _unfinished(self) -> int:
        return sum(path.stat().st_size for path in set(self.folder.iterdir()) - self.before)

    def refused(self, ran: Ran, slug: str, code: int = REFUSED) -> None:
        """And nothing is left: no target, no temporary file."""
        assert (ran.code, ran.out) == (code, "")
        assert f"[{slug}]" in ran.err
        assert set(self.folder.iterdir()) == self.before


@pytest.fixture
def objects(ctl: Ctl, tmp_path: Path) -> Objects:
    return Objects(ctl, tmp_path)


class TestSealAndOpen:
    def test_what_was_sealed_opens_for_its_owner_alone(self, objects: Objects) -> None:
        ran = objects("open", objects.sealed, objects.opened)
        assert (ran.code, ran.err) == (PASS, "")
        assert "opened, all verified" in ran.out
        assert objects.opened.read_bytes() == PLAIN
        assert objects.opened.stat().st_mode & 0o777 == 0o600

    def test_tells_sizes_as_json_and_nothing_of_the_content(self, objects: Objects) -> None:
        expected = {
            "result": "pass",
            "key_id": "kek-1",
            "object_id": "models/one",
            "object_version": 2,
            "plain_bytes": 3 << 20,
            "sealed_bytes": (3 << 20) + 40 + 4 * 16,
            "segment_bytes": 1 << 20,
            "segments": 4,
            "last_segment_bytes": 40 + 4 * 16,
        }
        assert objects("seal", objects.plain, objects.sealed, "--json").json == expected
        assert objects("open", objects.sealed, objects.opened, "--json").json == expected

    def test_the_other_cut(self, objects: Objects) -> None:
        objects("seal", objects.plain, objects.sealed, "--segment-size", "4KiB")
        assert objects("open", objects.sealed, objects.opened, "--segment-size", "4KiB").code == PASS
        assert objects.opened.read_bytes() == PLAIN
        objects.opened.unlink()
        objects.refused(objects("open", objects.sealed, objects.opened), "NOT_AUTHENTIC")

    def test_replaces_a_file_only_by_a_whole_one(self, objects: Objects) -> None:
        objects.opened.write_bytes(b"older")
        data = bytearray(objects.sealed.read_bytes())
        data[-1] ^= 1
        objects.sealed.write_bytes(data)
        assert objects("open", objects.sealed, objects.opened).code == REFUSED
        assert objects.opened.read_bytes() == b"older"

    def test_a_file_may_take_the_place_of_its_source(self, objects: Objects) -> None:
        assert objects("open", objects.sealed, objects.sealed).code == PASS
        assert objects.sealed.read_bytes() == PLAIN


class TestRefusals:
    @pytest.mark.parametrize("keep", [0, 39, 40, 55, 56, 1 << 20, (1 << 20) + 1, (3 << 20) + 103])
    def test_a_cut_object_leaves_nothing(self, objects: Objects, keep: int) -> None:
        os.truncate(objects.sealed, keep)
        ran = objects("open", objects.sealed, objects.opened)
        objects.refused(ran, "TRUNCATED" if keep < 56 or keep == (1 << 20) + 1 else "NOT_AUTHENTIC")

    @pytest.mark.parametrize(
        "other", [("--key-id", "kek-2"), ("--object-id", "models/two"), ("--object-version", "1")], ids=str
    )
    def test_another_object_or_version_of_the_same_key(self, objects: Objects, other: tuple[str, str]) -> None:
        objects.refused(objects("open", objects.sealed, objects.opened, *other), "NOT_AUTHENTIC")

    def test_a_refusal_as_json(self, objects: Objects) -> None:
        ran = objects("open", objects.plain, objects.opened, "--json")
        assert ran.code == REFUSED
        assert ran.json["reason"]["slug"] in ("BAD_FORMAT", "NOT_AUTHENTIC")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
    def test_a_key_that_others_may_use(self, objects: Objects, mode: int) -> None:
        objects.key.chmod(mode)
        objects.refused(objects("open", objects.sealed, objects.opened), "KEY_EXPOSED", USAGE)

    @pytest.mark.parametrize("size", [0, 16, 31, 33])
    def test_a_key_of_another_size(self, objects: Objects, size: int) -> None:
        objects.key.write_bytes(bytes(size))
        ran = objects("open", objects.sealed, objects.opened)
        objects.refused(ran, "BAD_KEY", USAGE)
        assert str(objects.key) in ran.err

    def test_files_that_are_not_there(self, objects: Objects) -> None:
        objects.refused(objects("open", objects.folder / "none", objects.opened), "NO_FILE", USAGE)
        objects.refused(objects("open", objects.folder, objects.opened), "NO_FILE", USAGE)
        objects.refused(objects("open", objects.sealed, objects.folder / "none" / "x"), "CANNOT_WRITE", USAGE)
        objects.key.unlink()
        objects.before.remove(objects.key)
        objects.refused(objects("open", objects.sealed, objects.opened), "NO_FILE", USAGE)

    @pytest.mark.parametrize("bad", [("--object-version", "0"), ("--object-id", "a b"), ("--key-id", "")], ids=str)
    def test_names_that_no_object_has(self, objects: Objects, bad: tuple[str, str]) -> None:
        objects.refused(objects("seal", objects.plain, objects.opened, *bad), "BAD_OBJECT_NAME", USAGE)

    def test_a_device_is_not_replaced_by_a_file(self, objects: Objects) -> None:
        pipe = objects.folder / "pipe"
        os.mkfifo(pipe)
        objects.before.add(pipe)
        objects.refused(objects("open", objects.sealed, pipe), "CANNOT_WRITE", USAGE)
        assert pipe.is_fifo()

    def test_json_and_data_do_not_share_standard_output(self, objects: Objects) -> None:
        objects.refused(objects("open", objects.sealed, "-", "--json"), "STDOUT_TAKEN", USAGE)


class TestPipes:
    def test_pipes_in_and_out(self, objects: Objects) -> None:
        with objects.process("open", "-", "-", stdin=subprocess.PIPE) as process:
            out, err = process.communicate(objects.sealed.read_bytes())
        assert (process.returncode, out, err) == (PASS, PLAIN, b"")

    def test_a_cut_stream_ends_in_failure_after_verified_bytes(self, objects: Objects) -> None:
        with objects.process("open", "-", "-", stdin=subprocess.PIPE) as process:
            out, err = process.communicate(objects.sealed.read_bytes()[: 2 << 20])
        assert process.returncode == REFUSED
        assert b"[NOT_AUTHENTIC]" in err
        assert out == PLAIN[: (1 << 20) - 56]

    def test_a_reader_that_stops_early_did_not_get_the_object(self, objects: Objects) -> None:
        with objects.process("open", objects.sealed, "-") as process:
            assert process.stdout is not None
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr is not None
            err = process.stderr.read()
            assert process.wait() == USAGE
        assert b"[CANNOT_WRITE]" in err

    def test_a_pipe_that_does_not_wait_is_no_end(self, objects: Objects) -> None:
        """Sealed as if it ended there, half a plaintext would pass for the whole."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.write(write, b"the first half")
        try:
            with objects.process("seal", "-", objects.opened, stdin=read) as process:
                _, err = process.communicate()
        finally:
            os.close(read)
            os.close(write)
        assert process.returncode == USAGE
        assert b"[NO_FILE]" in err
        assert set(objects.folder.iterdir()) == objects.before

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    def test_a_signal_leaves_nothing(self, objects: Objects, number: signal.Signals) -> None:
        heed = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 - whoever runs the tests may ignore it
        with objects.process("open", "-", objects.opened, stdin=subprocess.PIPE, preexec_fn=heed) as process:
            assert process.stdin is not None
            process.stdin.write(objects.sealed.read_bytes()[:-1])
            process.stdin.flush()
            objects.wait_for_most()
            process.send_signal(number)
            code = process.wait()
        assert code == 128 + number
        assert set(objects.folder.iterdir()) == objects.before

    def test_a_signal_that_the_caller_has_ignored_is_none(self, objects: Objects) -> None:
        ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731 - as nohup does
        with objects.process("open", "-", objects.opened, stdin=subprocess.PIPE, preexec_fn=ignore) as process:
            assert process.stdin is not None
            process.stdin.write(objects.sealed.read_bytes()[:-1])
            process.stdin.flush()
            objects.wait_for_most()
            process.send_signal(signal.SIGHUP)
            process.communicate(objects.sealed.read_bytes()[-1:])
        assert process.returncode == PASS
        assert objects.opened.read_bytes() == PLAIN


class TestProgress:
    def test_is_told_on_a_terminal(self, objects: Objects) -> None:
        main, terminal = pty.openpty()
        command = [sys.executable, "-m", "cgpu_agent.cli.main", *objects.command("seal", "-", objects.opened)]
        said = io.BytesIO()

        def listen() -> None:
            with contextlib.suppress(OSError):  # the terminal is gone
                while data := os.read(main, 4096):
                    said.write(data)

        listener = threading.Thread(target=listen)
        listener.start()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=terminal, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            deadline = time.monotonic() + 60
            while b"MB/s" not in said.getvalue() and time.monotonic() < deadline:
                process.stdin.write(bytes(8 << 20))
                process.stdin.flush()
            process.stdin.close()
            assert process.wait() == PASS
        os.close(terminal)
        listener.join()
        os.close(main)
        assert said.getvalue().startswith(b"\r\x1b[Kseal  ")
        assert said.getvalue().endswith(b"\r\x1b[K")

    @pytest.mark.parametrize(
        ("done", "total", "seconds", "line"),
        [
            (10**9, 4 * 10**9, 0.5, "open  1.00 GB of 4.00  2000 MB/s  0:02 left"),
            (10**9, 200 * 10**9, 1.0, "open  1.00 GB of 200.00  1000 MB/s  3:19 left"),
            (2 * 10**9, 10**9, 1.0, "open  2.00 GB of 1.00  2000 MB/s  0:00 left"),
            (10**9, None, 2.0, "open  1.00 GB  500 MB/s"),
            (0, 10**9, 1.0, "open  0.00 GB  0 MB/s"),
        ],
    )
    def test_tells_bytes_rate_and_time_left(self, done: int, total: int | None, seconds: float, line: str) -> None:
        assert describe("open", done, total, seconds) == line


class TestInspect:
    def test_tells_header_and_sizes(self, objects: Objects) -> None:
        ran = objects.ctl("object", "inspect", str(objects.sealed))
        assert (ran.code, ran.err) == (PASS, "")
        assert "nothing of this is verified" in ran.out
        found = objects.ctl("object", "inspect", str(objects.sealed), "--json").json
        data = objects.sealed.read_bytes()
        assert (found["salt"], found["nonce_prefix"]) == (data[1:33].hex(), data[33:40].hex())
        assert (found["plain_bytes"], found["segments"], found["last_segment_bytes"]) == (3 << 20, 4, 104)

    @pytest.mark.parametrize(
        ("size", "slug"), [(0, "TRUNCATED"), (40, "TRUNCATED"), (55, "TRUNCATED"), ((1 << 20) + 16, "TRUNCATED")]
    )
    def test_refuses_sizes_that_no_object_has(self, objects: Objects, size: int, slug: str) -> None:
        os.truncate(objects.sealed, size)
        objects.refused(objects.ctl("object", "inspect", str(objects.sealed)), slug)

    def test_refuses_other_files(self, objects: Objects) -> None:
        objects.sealed.write_bytes(bytes(100))
        objects.refused(objects.ctl("object", "inspect", str(objects.sealed)), "BAD_FORMAT")
        objects.refused(objects.ctl("object", "inspect", "/dev/null"), "NOT_A_FILE", USAGE)
