"""Lets training runs meet a full disk at one point of their saves after another, and go on once there is room.

    python tests/full_disk.py [--points 20]

In a file system of its own (Linux, mounts in a user's namespace) a run that has saved once is resumed with too little
room for the rest. It must end in one line and with status 2, leave its checkpoints whole and nothing half-written, and
end, once there is room, as the run that was left alone: its curve and final weights to the bit.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import launch  # first: it finds the rest
import test_parallel as runs
import torch
from torn_runs import check_whole

import train

ROOM, AUTO = 64 << 20, ["--resume_from_checkpoint", "auto"]


def run(source: str, output: Path, *more: str) -> tuple[int, str]:
    """Status and standard error of a run of 10 steps that saves after 4 and 8, in a fork, as torch is imported."""
    said = Path(source).with_name("said")  # not on the full disk
    if (child := os.fork()) == 0:
        file = said.open("w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(file.fileno(), 2)
        status = 1
        try:
            train.main(runs.flags_of(source, output, "--save_steps", "4", *more))
            status = 0
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


def main(points: int, place: Path) -> None:
    launch.shrink()
    torch.set_num_threads(1)
    source, disk, full = launch.make_source(place / "model"), place / "disk", Counter()

    def used() -> int:
        at = os.statvfs(disk)
        return (at.f_blocks - at.f_bfree) * at.f_bsize

    def resize(size: int, *how: str) -> None:
        subprocess.run(["mount", *how, "-o", f"{'' if how else 'remount,'}size={size}", "none", disk], check=True)

    # A run that is left alone, the same as it was after its first save, and what the rest of it needs.
    whole, begun, output = place / "whole", place / "begun", disk / "run"
    assert run(source, whole)[0] == 0
    shutil.copytree(whole, begun)
    for name in ("checkpoint-8", "checkpoint-final"):
        shutil.rmtree(begun / name)
    (begun / "curves.png").unlink()
    disk.mkdir()
    resize(ROOM, "-t", "tmpfs")
    shutil.copytree(begun, output)
    needed = -used()
    assert run(source, output, *AUTO)[0] == 0
    needed += used()

    for point in range(points):
        shutil.rmtree(output)
        shutil.copytree(begun, output)
        resize(used() + needed * point // points)
        status, said = run(source, output, *AUTO)
        assert status == 2 and "Traceback" not in said, said
        line = said.splitlines()[-1]
        assert re.match(r"train\.py: .*(No space left|0\.00 GB are free)", line), said
        assert check_whole(output) == (2 if (output / "checkpoint-8").exists() else 1)
        hidden = [path for path in output.rglob(".*") if path.name != ".metadata"]
        assert not hidden, hidden
        full[re.sub(r"^train.py: |\S*/run|; .*GB", " ", line)] += 1
        resize(ROOM)
        assert run(source, output, *AUTO)[0] == 0
        runs.assert_equal(whole, output)
    print(f"{points} full disks, from 0 to {needed:,} bytes of room; each run went on to the same end, to the bit")
    for line, times in full.items():
        print(f"  {times} x {line}")
    subprocess.run(["umount", "--lazy", disk], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        sys.exit(subprocess.run(["unshare", "-rm", sys.executable, *sys.argv, "--inside"]).returncode)
    with tempfile.TemporaryDirectory() as place:
        main(args.points, Path(place))
