"""Where a run meets the limits of its machine: told in one message, with nothing lost that was kept, and resumable."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from forked import Python
from guests import Outcome
from mishaps import same_end, told
from patience import PATIENCE
from PIL import Image

from branchtree.errors import OutputError
from branchtree.files.writing import disk_failure, writing
from branchtree.run.checkpoint import list_checkpoints
from branchtree.run.lock import LOCK, sole_process
from branchtree.run.manifest import require_whole
from branchtree.training import conditioning as policy

# --- a full disk: files may not grow any more, which the system says as it says that a disk is full ---

AT_2 = {"callback": "mishap", "at": 2}
FULL: dict[str, tuple[dict[str, Any], str, int]] = {
    # what is changed; what cannot be written; the iterations that are kept
    "checkpoint": ({"callbacks": [{**AT_2, "room": 8000}]}, "checkpoints/iteration_000003", 2),
    "in the background": (
        {"callbacks": [{**AT_2, "room": 8000}], "run__checkpoint_async": True, "run__iterations": 3},
        "checkpoints/iteration_000003",
        2,
    ),
    "metrics": ({"callbacks": [{**AT_2, "log": 10}], "run__checkpoint_every": 2}, "metrics.jsonl", 2),
    "after a step": ({"callbacks": [{**AT_2, "room": 50}], "run__checkpoint_every": 2}, "metrics.jsonl", 2),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    case: str, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    changes, place, kept = FULL[case]
    plain = {**changes, "callbacks": []}
    assert cli(tmp_path / "whole", "--no-report", **plain).code == 0
    run = tmp_path / "run"
    message = told(cli(run, "--no-report", **changes))
    assert message == (
        f"{run / place}: cannot be written: File too large. The checkpoint "
        f"{run}/checkpoints/iteration_{kept:06d} is kept: once there can be written again, go on with --resume"
    )
    assert not list(run.rglob("*.partial"))  # what was half written would only take room
    require_whole(list_checkpoints(run / "checkpoints")[-1])
    if case == "metrics":
        assert not (run / "metrics.jsonl").read_bytes().endswith(b"\n")
    resumed = cli(run, "--no-report", "--resume", **plain)
    assert resumed.code == 0, resumed.err
    assert same_end(run, tmp_path / "whole")


def test_without_room_for_the_end_the_last_checkpoint_is_kept(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    changes = {"model__adapter": "crowded", "run__iterations": 2}
    monkeypatch.setenv("CROWDED", "1")
    message = told(cli(run, "--no-report", **changes))
    assert message.startswith(f"{run}/final: cannot be written: File too large. The checkpoint ")
    assert not (run / "final").exists() and not (run / "summary.json").exists()
    monkeypatch.delenv("CROWDED")
    assert cli(run, "--no-report", "--resume", **changes).code == 0
    assert (run / "final/denoiser.safetensors").is_file()


def test_without_room_for_the_report_the_model_is_there(
    cli: Callable[..., Outcome], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli(run, "--no-report", run__iterations=1).code == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        done = command("report", str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = told(done)
    assert message.startswith(f"{run}/report.html: cannot be written: File too large")
    assert not (run / "report.html").exists() and (run / "final").is_dir()


def test_before_the_first_checkpoint_there_is_nothing_to_lose(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    message = told(cli(run, "--no-report", callbacks=[{"callback": "mishap", "at": 0, "room": 3000}]))
    assert message.startswith(f"{run}/checkpoints/iteration_000001: cannot be written: File too large. No checkpoint ")
    assert message.endswith("once there can be written again, begin again with --resume")
    assert cli(run, "--no-report", "--resume", run__iterations=1).code == 0


def test_who_says_that_a_disk_is_full() -> None:
    def refused(error: Exception) -> OutputError:
        with pytest.raises(OutputError) as caught, writing(Path("there")):
            raise error
        return caught.value

    assert str(refused(OSError(errno.ENOSPC, "No space left on device"))).endswith(
        "there: cannot be written: No space left on device"
    )
    rust = RuntimeError("Error while serializing: I/O error: Quota (os error 122)")
    assert str(refused(rust)).endswith(os.strerror(errno.EDQUOT))
    full = Path("/dev/full")  # takes nothing; PyTorch hides the reason behind an error of its own
    with pytest.raises(OutputError, match="No space left"), writing(full), full.open("wb") as file:
        torch.save({"a": torch.zeros(10)}, file)
    assert disk_failure(RuntimeError("shapes differ (os error 9999)")) is None
    with pytest.raises(ZeroDivisionError), writing(Path("there")):
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="other"), writing(Path("there")):
        try:
            raise OSError(errno.EINTR, "interrupted")
        except OSError:
            raise ValueError("other")  # noqa: B904


IN_A_SMALL_DISK = """
    import json, os, subprocess, sys
    from pathlib import Path

    disk, outside, sites = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.path[:0] = sites
    from branchtree.cli import main

    def mount(*options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)

    def command(*words):
        sys.argv = ["branchtree", *words]
        try:
            main()
        except SystemExit as stopped:
            return stopped.code or 0

    run, fixed = disk / "run", ["guest", "evaluation=null", "callbacks=[]", "run.checkpoint_every=1", "--no-report"]
    fixed += ["run.keep_checkpoints=100", "run.iterations=12"]
    mount("size=200k")
    codes = [command("train", *fixed, "--output", str(run))]
    print("kept", len(list((run / "checkpoints").glob("iteration_*"))))
    codes.append(command("train", *fixed, "--output", str(run), "--resume"))
    mount("remount", "size=20m")
    codes.append(command("train", *fixed, "--output", str(run), "--resume"))
    codes.append(command("train", *fixed, "--output", str(outside)))
    same = [(run / name).read_bytes() == (outside / name).read_bytes()
            for name in ("metrics.jsonl", "final/denoiser.safetensors")]
    mount("remount", "ro")
    codes.append(command("train", *fixed, "--output", str(run), "--resume"))
    codes.append(command("train", *fixed, "--output", str(disk / "other")))
    print("codes", json.dumps(codes))
    print("same", json.dumps(same))
"""


def test_a_small_disk_that_fills_up_is_enlarged_and_made_read_only(guest_site: Path, tmp_path: Path) -> None:
    """A real file system of 200 KiB, in a name space of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no name spaces for users here")
    disk, outside = tmp_path / "disk", tmp_path / "outside"
    disk.mkdir()
    words = ["unshare", "-rm", sys.executable, "-c", dedent(IN_A_SMALL_DISK), str(disk), str(outside), str(guest_site)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=PATIENCE, check=False, env={**os.environ, "COLUMNS": "1000"}
    )
    assert done.returncode == 0, done.stderr
    assert "codes [2, 2, 0, 0, 2, 2]" in done.stdout and "same [true, true]" in done.stdout, done.stdout + done.stderr
    kept = int(done.stdout.split("kept ")[1].split()[0])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= kept < 12
    assert "cannot be written: No space left on device" in errors[0]
    assert errors[0].endswith(f"iteration_{kept:06d} is kept: once there can be written again, go on with --resume")
    for line in errors[2:]:
        assert line.endswith(": cannot be written: Read-only file system; choose another --output")


# --- files that vanish ---


def test_a_prompt_file_that_is_gone_is_named_at_the_start_and_on_resume(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    prompts, run = tmp_path / "p.txt", tmp_path / "run"
    prompts.write_text("a lamp\nthe sun\n")
    changes = {"data__prompts": str(prompts), "run__iterations": 2}
    assert cli(run, "--no-report", **changes).code == 0
    prompts.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for flags in ((), ("--resume",)):
        assert f"no prompt file {prompts}" in told(cli(run if flags else tmp_path / "new", *flags, **changes))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_an_image_that_is_gone_ends_the_run_with_a_checkpoint(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four prompts, two are read in the first iteration; one of the others has lost its image by the second.

    With room for the encodings of all, all are read at the start, and nothing is missed.
    """
    rows = [{"prompt": f"lamp {place}", "image": f"{place}.png"} for place in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{place}.png")
    fixed = {
        "model__adapter": "framed",
        "data__prompts": str(tmp_path / "p.jsonl"),
        "data__shuffle": False,
        "run__checkpoint_every": 100,
        "run__sample_prompts": 1,
        "run__iterations": 4,
    }
    assert cli(tmp_path / "whole", "--no-report", **fixed).code == 0
    run, gone = tmp_path / "run", tmp_path / "3.png"
    mishap = {"callback": "mishap", "at": 0, "remove": str(gone)}
    with monkeypatch.context() as cramped:
        cramped.setattr(policy, "CACHE_BYTES", 1)
        cramped.setattr(policy, "PREPARED", 1)
        message = told(cli(run, "--no-report", **fixed, callbacks=[mishap]))
    assert str(gone) in message and "p.jsonl:4" in message
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["iteration_000001"]
    assert str(gone) in told(cli(run, "--no-report", "--resume", **fixed))
    Image.new("RGB", (8, 8)).save(gone)
    assert cli(run, "--no-report", "--resume", **fixed).code == 0
    assert same_end(run, tmp_path / "whole")
    assert cli(tmp_path / "roomy", "--no-report", **fixed, callbacks=[mishap]).code == 0
    assert same_end(tmp_path / "roomy", tmp_path / "whole") and not gone.exists()


# --- a second process ---


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_second_process_is_refused_with_the_first_ones_name(
    flags: tuple[str, ...], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli(run, "--no-report", run__iterations=1).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / LOCK not in before
    with sole_process(run):
        message = told(cli(run, *flags, run__iterations=1))
    assert message.startswith(f"{run}: process {os.getpid()} on {socket.gethostname()} is writing to it")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert cli(run, "--no-report", "--resume", run__iterations=2).code == 0


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from branchtree.run.lock import sole_process
        with sole_process(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", dedent(code)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"process {holder.pid} on "), sole_process(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).exists()  # the file is left, and is nobody's
    with sole_process(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()} on "), sole_process(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_without_locks_the_file_system_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with sole_process(tmp_path):
        assert "without locks (" in caplog.text and "No locks available" in caplog.text


# --- signals ---


def start(run: Path, sites: list[Path], **environment: str) -> Python:
    words = ["train", "guest", "evaluation=null", "callbacks=[]", "run.iterations=100000", "rewards.0.reward=slow"]
    words += ["run.checkpoint_every=1", "--output", str(run), "--no-report"]
    paths = os.pathsep.join([*map(str, sites), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "1000", **environment}
    return Python("-m", "branchtree", *words, environment=environment)


def test_asked_to_end_a_run_ends_its_iteration(
    guest_site: Path, mishap_site: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, [guest_site, mishap_site])
    process.wait_for(run / "metrics.jsonl")
    process.send(signal.SIGTERM)
    assert process.ended() == 0, process.err
    done = len((run / "metrics.jsonl").read_bytes().splitlines())
    assert f"Stopped after {done} iterations; continue with --resume" in process.out
    assert "stopping after this iteration, with a checkpoint" in process.err
    assert list_checkpoints(run / "checkpoints")[-1].name == f"iteration_{done:06d}"
    assert not (run / "final").exists() and not (run / LOCK).exists()


def test_interrupted_twice_a_run_stops_at_once(
    guest_site: Path, mishap_site: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Its reward would take half an hour, in a thread of its own."""
    run = tmp_path / "run"
    process = start(run, [guest_site, mishap_site], SLOW="1800")
    process.wait_for_output("scoring")
    process.send(signal.SIGINT)
    # Until then a second signal could be merged with the first.
    process.wait_for_output("stopping after this iteration", "err")
    process.send(signal.SIGINT)
    assert process.ended() == 130
    assert "Traceback" not in process.err
    assert "stopped at once" in process.err
    changes = {"rewards__0__reward": "slow", "run__iterations": 1}
    assert not run.exists()  # nothing was learnt yet
    assert cli(run, "--no-report", **changes).code == 0
