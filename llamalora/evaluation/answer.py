"""Sentences -> prompts -> decoding -> answers, with the mentions that they mean and how sure the model was."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import accumulate

import torch

from ..corpus.documents import Sentence
from ..corpus.tagged import tokenised
from ..distributed.sharding import in_step
from ..distributed.world import World
from ..model.llama import Llama
from ..progress import Bar
from ..task.definition import Task
from ..task.parse import parse
from ..task.prompt import render_prompt
from ..task.tokenizer import TextStream, Tokenizer
from .answered import Answer
from .constrain import Constraint
from .draft import Habits, SourceDrafter
from .generate import generate
from .room import decoding_items, expected, explained

DRAFT_TOKENS = 40


@dataclass(frozen=True)
class Speed:
    """Work done by decoding, over all processes."""

    seconds: float
    sentences: int
    tokens: int
    forward_passes: int
    row_passes: int  # forward passes of each sentence, added up

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict:
        return {
            "seconds": self.seconds,
            "sentences_per_second": self.sentences / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "tokens": self.tokens,
            "forward_passes": self.forward_passes,
            "tokens_per_pass": self.tokens / max(1, self.forward_passes),
            "tokens_per_row_pass": self.tokens / max(1, self.row_passes),
        }


def answer_sentences(
    model: Llama,
    tokenizer: Tokenizer,
    task: Task,
    asked: Sequence[Sentence],
    world: World,
    batch_size: int = 32,
    draft_tokens: int = DRAFT_TOKENS,
    quiet: bool = False,
    constrain: bool = False,
    known: Sequence[Sentence] = (),
    stop: Callable[[], object] = lambda: False,
    habits: Habits | None = None,
) -> tuple[list[Answer], Speed]:
    """Asks a (merged) model about every sentence; processes share the work and all get all answers, in
    the order of the sentences.

    Args:
        batch_size: sentences decoded side by side at most; where the memory is small fewer, as standard error says.
        draft_tokens: drafted at most from the source for a forward pass, in tagging; 0 is plain greedy decoding.
        constrain: only answers that are the sentence with legal tags (tagging only).
        known: sentences whose mentions are known, from which drafts learn what is mostly tagged, and the constraint
            what is tagged inside words.
        stop: as in `generate`; the answers are then worth nothing.
        habits: what drafts learn from `known` (`draft.prime`), for who asks more than once.
    """
    started = time.perf_counter()
    mine = asked[world.rank :: world.size]
    prompts = [tokenizer.encode(render_prompt(task, sentence.text)) for sentence in mine]
    context = model.config.max_position_embeddings
    fits = [index for index, prompt in enumerate(prompts) if len(prompt) < context]
    texts = [mine[index].text for index in fits]
    limits = [new_tokens(tokenizer, task, mine[index].text, context - len(prompts[index]), constrain) for index in fits]
    drafter = None
    if task.copies and draft_tokens:
        rows = min(batch_size, len(fits))
        drafter = SourceDrafter(tokenizer, task, texts, risk(rows, world), draft_tokens, habits or known)
    # what the configuration names without regard to the tokenizer (transformers' default is 2) may be text
    ends = {tokenizer.eos_id, *(end for end in model.config.end_ids if not tokenizer.spell([end]))}
    grammar = Constraint(tokenizer, task, texts, limits, known) if constrain else None
    hidden = quiet or world.terse or not world.is_main
    longest = max((expected(len(prompts[i]), limit) for i, limit in zip(fits, limits, strict=True)), default=0)
    held = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
    plan = partial(decoding_items, model.config, model.model.norm.weight.itemsize, held, longest)
    with (
        Bar("decoding", len(mine), "sentence", hidden=hidden) as bar,
        explained("decoding one sentence at a time", plan, world.device),
    ):
        decoding = in_step(model, world, lambda: generate(
            model, [prompts[i] for i in fits], ends, limits, batch_size, drafter, grammar, bar.update, stop,
            bar.say,
        ))  # fmt: skip
    answers = [Answer(sentence, "", parse(task, sentence.text, ""), overlong=True) for sentence in mine]
    decoded = zip(fits, decoding.outputs, decoding.truncated, decoding.log_probs, strict=True)
    for index, ids, truncated, log_probs in decoded:
        output = tokenizer.decode(ids)
        parsed = parse(task, mine[index].text, output, truncated)
        confidence = dict(zip(parsed.spans, confidences(tokenizer, ids, log_probs, parsed.written), strict=True))
        answers[index] = Answer(mine[index], output, parsed, confidence=confidence)
    tokens = sum(len(ids) + 1 for ids in decoding.outputs)
    shares = world.gather(answers)
    answers = [shares[index % world.size][index // world.size] for index in range(len(asked))]
    work = map(int, world.sum([tokens, decoding.forward_passes, decoding.row_passes]))
    return answers, Speed(time.perf_counter() - started, len(asked), *work)


def risk(rows: int, world: World) -> float:
    """The probability below which a drafted token costs more than it saves, if so many rows share a pass.

    A pass has a fixed cost, on a CPU (SmolLM2) that of about 16 tokens, on a GPU that of hundreds.
    """
    fixed = 16 if world.device.type == "cpu" else 512
    return rows / (rows + fixed)


def confidences(
    tokenizer: Tokenizer, ids: Sequence[int], log_probs: Sequence[float], places: Sequence[tuple[int, int]]
) -> list[float]:
    """How sure the model was of mentions: for each place in its output the probability, given what stands before it,
    of all tokens that have a share in it.

    For a tagged mention that is the probability that it begins there, with this label, and ends there: the opening
    tag, the text, the closing tag; for an extracted one, that of the string.

    Args:
        ids, log_probs: the tokens of the output (see `generate.Decoding`).
        places: from and to, in characters of the output.
    """
    stream = TextStream(tokenizer)
    pieces = [stream.read([token]) for token in ids]
    ends = list(accumulate(map(len, pieces), initial=-"".join(pieces).startswith(" ")))  # the output lacks that space
    sure = []
    for first, last in places:
        shares = zip(log_probs, ends, ends[1:], strict=False)
        # of the tokens that make up one character only the last has a length
        sure.append(math.exp(sum(p for p, start, end in shares if start < last and (end > first or start >= first))))
    return sure


def new_tokens(tokenizer: Tokenizer, task: Task, text: str, room: int, constrain: bool = False) -> int:
    """New tokens allowed for a sentence: enough for its answer even where every run of letters, or in scripts without
    spaces every letter, is a mention, and under the constraint even where a model spells the sentence byte by byte."""
    pairs = (task.tags(label) for label in task.labels)
    tags = max(sum(len(tokenizer.encode_continuation(tag)) for tag in pair) for pair in pairs)
    plain = len(text.encode()) + 2 if constrain else len(tokenizer.encode_continuation(" " + text))
    words = sum(text[start].isalnum() for start, _ in tokenised(text))
    return min(plain + tags * (words + 1), room)
