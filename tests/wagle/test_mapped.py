"""Words of a mask in a file without a name: what they hold, and when they take memory."""

from pathlib import Path

import pytest
import torch

from moe_unlearn.wagle.mapped import MappedWords

pytestmark = pytest.mark.quick
COUNT = 1 << 20


def resident():
    """Return the KiB of files that this process has in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


def test_words_that_are_released_take_no_memory_and_keep_what_was_written(tmp_path):
    words = MappedWords(tmp_path, COUNT)
    first, second = words.zeros((2, COUNT // 4)), words.zeros((COUNT // 2,))
    assert not first.any() and not second.any() and not list(tmp_path.iterdir())
    first[1], second[-1] = torch.arange(COUNT // 4), 7
    second[0] = -1
    before = resident()
    words.release()
    assert before - resident() > 3 * COUNT // 1024  # KiB, of the 4 that a word takes
    del words
    assert torch.equal(first[1], torch.arange(COUNT // 4, dtype=torch.int32)) and not first[0].any()
    assert second.nonzero().flatten().tolist() == [0, COUNT // 2 - 1] and int(second[-1]) == 7


def test_no_words_are_none_and_a_folder_that_cannot_be_made_is_named(tmp_path):
    assert MappedWords(tmp_path, 0).zeros((3, 0)).shape == (3, 0)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/below"):
        MappedWords(tmp_path / "file" / "below", 1)
