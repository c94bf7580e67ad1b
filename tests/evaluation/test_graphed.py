"""Which passes become graphs. What a GPU does with them is in emulated_cuda/inside."""

from types import SimpleNamespace

import pytest

from llamalora.evaluation.graphed import MOST, Graphs, most_tokens
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LLAMA_2


@pytest.mark.parametrize(
    ("capability", "width", "tokens"), [(7, 2, 156), (8, 2, 313), (9, 2, 1305), (9, 4, 163), (12, 2, 313)]
)
def test_the_faster_the_gpu_the_more_tokens_are_computed_while_they_would_be_launched(capability, width, tokens):
    assert most_tokens(skeleton(LLAMA_2["llama-2-7b"]), width, capability) == tokens


def test_what_is_too_wide_is_no_rectangle():
    width = Graphs.width.__get__(SimpleNamespace(most=MOST, able=True))
    assert width([[1]]) == 1
    assert width([[], [1, 2, 3]]) == 4
    assert width([[0] * MOST]) == MOST
    assert width([[0] * (MOST + 1)]) == 0
    assert width([[0] * (MOST // 8 + 1)] + [[0]] * 7) == 0
