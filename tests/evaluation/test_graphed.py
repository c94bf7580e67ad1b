"""Passes of a fixed shape against passes as they come. What a GPU does with them is in emulated_cuda/inside."""

import pytest
import torch
from helpers import random_ids, tiny_model

from llamalora.evaluation.graphed import MOST, Graphs
from llamalora.model.packing import FixedPacking, Packing

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}], ids=["gqa", "mha"])
@torch.no_grad()
def test_a_padded_pass_is_the_pass(shape):
    """Rows of three, one and two tokens that go on at 5, 2 and 0, as a rectangle of four tokens."""
    model, ids = tiny_model(**shape), random_ids(1, 13)
    lengths, starts = [3, 1, 2], [5, 2, 0]
    feeds = ids[0, 7:].split(lengths)
    padded = torch.zeros(3, 4, dtype=torch.long)
    for row, feed in zip(padded, feeds, strict=True):
        row[: len(feed)] = feed
    found = []
    for fixed in (False, True):
        cache = model.make_cache(3, 16)
        model.model(ids[:, :7], Packing([5, 2], CPU, rows=[0, 1]), cache)
        if fixed:
            packing = FixedPacking(torch.tensor(starts), 4, 12)
            rows = model(padded.reshape(1, -1), packing, cache)[0].unflatten(0, (3, 4))
            found.append(torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]))
        else:
            found.append(model(ids[:, 7:], Packing(lengths, CPU, starts), cache)[0])
    torch.testing.assert_close(*found)


def test_what_is_too_wide_is_no_rectangle():
    assert Graphs.width([[1]]) == 1
    assert Graphs.width([[], [1, 2, 3]]) == 4
    assert Graphs.width([[0] * MOST]) == MOST
    assert Graphs.width([[0] * (MOST + 1)]) == 0
    assert Graphs.width([[0] * 5] + [[0]] * 16) == 0
