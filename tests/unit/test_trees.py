"""What a copy of files that are in use takes for no error."""

import subprocess
from pathlib import Path

import pytest

from sysctr.engine.trees import FORGIVE, GONE

# As rsync 3.2.7 said it while files came and went.
_CAME_AND_WENT = """\
file has vanished: "/source/busy/17"
rsync: [sender] get_xattr_names: llistxattr("/source/busy/18",256) failed: No such file or directory (2)
rsync: [sender] get_acl: sys_acl_get_file(busy/19, ACL_TYPE_ACCESS): No such file or directory (2)
IO error encountered -- skipping file deletion
rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(1338) [sender]
"""


@pytest.mark.parametrize(
    ("words", "status", "after"),
    [
        (_CAME_AND_WENT, 23, 24),
        (_CAME_AND_WENT, 11, 11),
        ("", 23, 23),
        (f"{_CAME_AND_WENT}rsync: [sender] send_files failed to open: Permission denied (13)\n", 23, 23),
        (f"{_CAME_AND_WENT}rsync: [receiver] write failed: No space left on device (28)\n", 23, 23),
    ],
    ids=["gone", "another-end", "no-words", "not-readable", "full"],
)
def test_what_is_gone_is_no_error_and_all_else_is(
    tmp_path: Path, words: str, status: int, after: int
) -> None:
    said = tmp_path / "words"
    said.write_text(words)
    script = f"{FORGIVE.replace('/tmp/words', str(said))}status=$1; forgive '{GONE}'; echo $status"
    done = subprocess.run(
        ["sh", "-euc", script, "forgive", str(status)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{after}\n", "")
