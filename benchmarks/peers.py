"""Whom decoding is measured against, with our merged weights: transformers and CTranslate2."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from llamalora.corpus.documents import Sentence
from llamalora.evaluation.answer import new_tokens
from llamalora.evaluation.systems import System
from llamalora.model.checkpoint import save_model
from llamalora.task.prompt import render_prompt


class Questions:
    """Prompts, and the most tokens that may answer each."""

    def __init__(self, system: System, asked: Sequence[Sentence]):
        self.tokenizer = system.tokenizer
        self.prompts = [system.tokenizer.encode(render_prompt(system.task, sentence.text)) for sentence in asked]
        context = system.model.config.max_position_embeddings
        self.limits = [
            new_tokens(system.tokenizer, system.task, sentence.text, context - len(prompt))
            for sentence, prompt in zip(asked, self.prompts, strict=True)
        ]

    def answers(self, written: Iterable[Sequence[int]]) -> list[str]:
        """The text of what was written to each prompt, up to its end or its limit."""
        end, texts = self.tokenizer.eos_id, []
        for new, limit in zip(written, self.limits, strict=True):
            texts.append(self.tokenizer.decode(new[: min(limit, new.index(end) if end in new else limit)]))
        return texts


class Transformers:
    """Used as its documentation has it: batches of sentences in the order of the corpus, padded on the left."""

    def __init__(self, system: System, questions: Questions):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = system.model.config.to_dict() | {"tie_word_embeddings": False}  # an update may have parted them
        rope = {"rope_type": "default"} | (shape.pop("rope_scaling") or {}) | {"rope_theta": shape.pop("rope_theta")}
        weight = system.model.model.norm.weight
        self.model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)).to(weight.device, weight.dtype).eval()
        weights = system.model.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self.questions = questions

    @torch.no_grad()
    def answer(self, batch: int, **options) -> list[str]:
        device, end = self.model.device, self.questions.tokenizer.eos_id
        outputs: list[list[int]] = []
        for first in range(0, len(self.questions.prompts), batch):
            prompts = self.questions.prompts[first : first + batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
            outputs += self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(self.questions.limits[first:][:batch]),
                eos_token_id=end, pad_token_id=end, **options,
            )[:, longest:].tolist()  # fmt: skip
        return self.questions.answers(outputs)

    @torch.no_grad()
    def differences(self, ours: list[str], theirs: list[str]) -> list[dict]:
        """Where outputs differ, and how far apart the logits of the two choices are there in this model."""
        found, tokenizer = [], self.questions.tokenizer
        for prompt, mine, other in zip(self.questions.prompts, ours, theirs, strict=True):
            if mine == other:
                continue
            a, b = (tokenizer.encode_continuation(" " + text) + [tokenizer.eos_id] for text in (mine, other))
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            logits = self.model(torch.tensor([prompt + a[:at]], device=self.model.device)).logits[0, -1].float()
            gap = logits[b[at]] - logits[a[at]]
            found.append({"ours": mine, "theirs": other, "logit_gap": gap.item(), "largest_logit": logits.max().item()})
        return found


class CTranslate2:
    """Batches of like length, as it makes them itself, but each with a limit of its own."""

    TYPES = ("bfloat16", "float32", "int8")

    def __init__(self, folder: Path, kind: str, threads: int, questions: Questions):
        """
        Args:
            folder: what `convert` wrote.
            kind: its compute type.
        """
        from ctranslate2 import Generator

        self.generator = Generator(str(folder), compute_type=kind, inter_threads=1, intra_threads=threads)
        names = json.loads((folder / "vocabulary.json").read_text())
        self.questions = questions
        self.prompts = [[names[token] for token in prompt] for prompt in questions.prompts]
        self.order = sorted(range(len(self.prompts)), key=lambda index: -len(self.prompts[index]))

    def answer(self, batch: int) -> list[str]:
        written: list[list[int]] = [[]] * len(self.prompts)
        for first in range(0, len(self.order), batch):
            those = self.order[first : first + batch]
            results = self.generator.generate_batch(
                [self.prompts[index] for index in those], max_batch_size=batch, beam_size=1, sampling_topk=1,
                max_length=max(self.questions.limits[index] for index in those), include_prompt_in_result=False,
                end_token=[self.questions.tokenizer.eos_id],
            )  # fmt: skip
            for index, result in zip(those, results, strict=True):
                written[index] = result.sequences_ids[0]
        return self.questions.answers(written)


def compute_types(precision: str, device: torch.device) -> list[str]:
    """What CTranslate2 computes in beside ours: in fp32 that alone, else whatever it has. Nothing where it is not
    installed, or ours is not on the CPU."""
    if find_spec("ctranslate2") is None or device.type != "cpu":
        return []
    from ctranslate2 import get_supported_compute_types

    known = get_supported_compute_types("cpu")
    return [kind for kind in CTranslate2.TYPES if kind in known and (precision != "fp32" or kind == "float32")]


def convert(system: System, folder: Path) -> Path:
    """Our merged model as a folder that CTranslate2 reads, made by its own converter, but with our names of the tokens,
    which need no tokenizer of transformers'."""
    from ctranslate2.converters import TransformersConverter

    vocabulary, size = system.tokenizer.vocabulary, system.model.config.vocab_size
    names = {token: name for name, token in vocabulary.items()}
    vocabulary = {names.get(token, f"<{token} of the model alone>"): token for token in range(size)}
    end = names[system.tokenizer.eos_id]
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, bos_token=end, eos_token=end, unk_token=end)

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_, **__):
            return tokenizer

    save_model(system.model, folder / "merged")
    return Path(Converter(str(folder / "merged")).convert(str(folder / "converted")))
