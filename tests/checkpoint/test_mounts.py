"""Which file systems other hosts may change, and a local checkpoint that is found on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import snapshot
from hypothesis import given
from hypothesis import strategies as st
from small_disk import Disk, mounted

from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.mounts import filesystem_type_of, is_remote, network_filesystem_type

pytestmark = [pytest.mark.extended, pytest.mark.long]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from mounted(tmp_path / "disk")


MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 27 0:30 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 8:2 / /home/local rw - xfs /dev/sdb1 rw
32 27 0:32 / /my\040data\134\011 rw - lustre 10.0.0.1@tcp:/fs rw
33 27 0:33 / /over rw - ext4 /dev/sdc1 rw
34 33 0:34 / /over rw - fuse.sshfs me@there:/ rw
35 27 0:35 /sub /bind rw - cifs //server/share rw
36 27 0:36 / /broken rw
37
"""


@pytest.mark.parametrize(
    ("path", "fstype"),
    [
        ("/", "ext4"),
        ("/ckpt", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/ckpt", "nfs4"),
        ("/homeless/ckpt", "ext4"),
        ("/home/local/ckpt", "xfs"),
        ("/home/locally", "nfs4"),
        ("/my data\\\t/ckpt", "lustre"),
        ("/over/ckpt", "fuse.sshfs"),
        ("/bind/a", "cifs"),
        ("/broken/a", "ext4"),
    ],
)
def test_the_mount_that_a_path_is_under(path: str, fstype: str) -> None:
    assert filesystem_type_of(MOUNTS, path) == fstype


@given(st.text() | st.text("/ -\\0a\n"), st.text().map("/".__add__))
def test_any_table_has_an_answer(mounts: str, path: str) -> None:
    assert filesystem_type_of("", path) is None
    fstype = filesystem_type_of(mounts, path)
    assert fstype is None or fstype in mounts


REMOTE = """
    nfs nfs4 lustre cifs smb3 ceph gpfs beegfs 9p glusterfs
    fuse fuse.sshfs fuse.s3fs fuse.gcsfuse fuse.juicefs fuse.never-heard-of
"""
LOCAL = "ext4 xfs btrfs zfs tmpfs overlay f2fs fuseblk fuse.fuse-overlayfs virtiofs"


@pytest.mark.parametrize("fstype", REMOTE.split())
def test_what_other_hosts_may_change_is_remote(fstype: str) -> None:
    assert is_remote(fstype)


@pytest.mark.parametrize("fstype", LOCAL.split())
def test_what_this_host_has_for_itself_is_not(fstype: str) -> None:
    assert not is_remote(fstype)


def test_this_machines_own_mounts(disk: Disk) -> None:
    table = Path("/proc/self/mountinfo").read_text()
    assert filesystem_type_of(table, str(disk.path / "ckpt")) == "tmpfs"
    assert network_filesystem_type(disk.path / "not" / "there") is None


LOOK = """
import sys
from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.local.backend import LocalBackend
for call in (
    LocalBackend(sys.argv[1]).ensure,
    Checkpoint(sys.argv[1]).status,
    Checkpoint(sys.argv[1]).check,
    Checkpoint(sys.argv[1]).compact,
    lambda: Checkpoint(sys.argv[1]).reset(state="all"),
    lambda: LocalBackend(sys.argv[1]).committed_by_dead_runs("x"),
):
    try:
        call()
        print("done")
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_local_checkpoint_that_moved_to_a_network_file_system_is_not_touched(
    tmp_path: Path, through_a_link: bool
) -> None:
    """With the kernel's table replaced by one in which the directory is mounted by NFS."""
    checkpoint = tmp_path / "nfs" / "ckpt"
    LocalBackend(checkpoint).ensure()
    WriterFile.create(checkpoint, "aaaaaaaaaaaa", {}).close()
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    table = tmp_path / "table"
    table.write_text(f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:9 / {tmp_path}/nfs rw - nfs4 b rw\n")
    before = snapshot(tmp_path)
    given = (tmp_path / "link" if through_a_link else tmp_path / "nfs") / "ckpt"
    script = 'mount --bind "$1" /proc/$$/mountinfo || exit 77; shift; exec "$@"'
    look = [sys.executable, "-c", LOOK, str(given)]
    child = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(table), *look],
        capture_output=True,
        text=True,
    )
    if child.returncode in (1, 77) and not child.stdout:
        pytest.skip(f"nothing can be mounted here: {child.stderr}")
    told = child.stdout.splitlines()
    assert len(told) == 6, child
    for line in told[:1] + told[-1:]:
        assert f"{given} is on a network file system (nfs4)" in line
    for line in told[1:-1]:
        assert f"{given} was made in a directory of one host's own" in line
    assert all("local disk" in line for line in told)
    assert snapshot(tmp_path) == before
