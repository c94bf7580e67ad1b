#!/usr/bin/env python3
"""Makes weights/tiny: a Llama of 3.5 million parameters, pretrained on generated text in half an hour on two cores.

A part of the text is biomedical language (pretrain_templates.txt filled with pretrain_names.txt) and, at the end,
glossaries, so that the model knows a drug from a disease as a real base model does. The rest is copying practice:
sentences, noise and random tokens repeated after a cue, most of them with some words put in brackets. Nothing in it
marks mentions by their type: that is left to fine-tuning.
"""

import argparse
import math
import random
import re
import shutil
import string
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from llamalora.model.checkpoint import save_model  # noqa: E402
from llamalora.model.config import LlamaConfig  # noqa: E402
from llamalora.model.llama import Llama  # noqa: E402

# noqa: E402

VOCABULARY = 2048
CHUNK, ROWS = 256, 8  # tokens of a row, rows of a batch
PEAK = 1e-3  # learning rate
# seed of the text, optimizer steps, mixture: first language and copying; then mostly brackets, since to go on copying
# behind one is what a tagger needs and the hardest to learn; last what the names mean
MEANING = {"marking": 0.95, "noisy": 0.1, "naming": 0.4}
PHASES = [
    (3, 1600, {"marking": 0.75, "noisy": 0.3}),
    (4, 1600, {"marking": 0.95, "noisy": 0.1}),
    (5, 800, MEANING),
    (6, 800, MEANING),
]


# ---- text ----


def read_sections(path: Path) -> dict[str, list[str]]:
    """`[section]` -> its lines, without comments."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            lines = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


NAMES = {
    kind: [
        tuple(re.fullmatch(r"(.+?)(?: \(([^ ]+)\))?", name.strip()).groups())
        for line in lines
        for name in line.split(";")
    ]
    for kind, lines in read_sections(HERE / "pretrain_names.txt").items()
}
WORDS = read_sections(HERE / "pretrain_templates.txt")
SENTENCES = WORDS.pop("sentence")
WORDS = {name: [word.strip() for line in lines for word in line.split(";")] for name, lines in WORDS.items()}
ENDINGS = {
    "chemical": "ine ol ide mycin azole pril statin amide one ate cillin oxacin azepam idine olol sartan ium".split(),
    "disease": "itis osis emia pathy oma algia uria rhea trophy plasia plegia toxicity penia megaly spasm".split(),
}
KINDS = {
    "chemical": ("a drug", "a medicine", "a chemical", "a compound"),
    "disease": ("a disease", "an illness", "a disorder", "a symptom"),
}
CUES = [("Input", "Answer")] * 3 + [
    ("Text", "Copy"), ("Source", "Output"), ("Original", "Again"), ("Sentence", "Repeat"), ("Question", "Answer"),
    ("Note", "Note"), ("First", "Second"), ("Input", "Output"), ("A", "B"), ("Abstract", "Abstract"),
]  # fmt: skip
BRACKETS = [("(", ")"), ("[", "]"), ('"', '"'), ("{", "}"), ("<", ">"), ("*", "*"), ("/", "/"), ("'", "'")]
SYMBOLS = "@#[]()/%&*+-=<>:;,.!?'\"_{}|~^$"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


class Writer:
    """Draws text; everything that is random comes from the one generator.

    Of what is copied, a share `marking` gets brackets, and a share `noisy` is noise in part. A share `naming`
    of the documents are glossaries.
    """

    def __init__(self, seed: int, marking: float = 0.75, noisy: float = 0.3, naming: float = 0.0):
        self.random = random.Random(seed)
        self.marking, self.noisy, self.naming = marking, noisy, naming

    def number(self) -> str:
        return str(
            self.random.choice((self.random.randint(1, 12), self.random.randint(1, 99), self.random.randint(100, 1999)))
        )

    def letters(self, low: int, high: int, alphabet: str = string.ascii_lowercase) -> str:
        return "".join(self.random.choices(alphabet, k=self.random.randint(low, high)))

    def invented(self, kind: str) -> str:
        """A name that looks like a chemical or a disease and is in no list."""
        syllables = (
            self.random.choice("bcdfglmnprstvz") + self.random.choice("aeiouy")
            for _ in range(self.random.randint(1, 2))
        )
        stem = self.random.choice(WORDS["made"]).lower() + "".join(syllables)
        return stem + self.random.choice(ENDINGS[kind])

    def name(self, kind: str) -> list[str]:
        """[what is written now, what may be written later]."""
        long, short = self.random.choice(NAMES[kind])
        if self.random.random() < 0.12:
            long, short = self.invented(kind), None
        if short is None and self.random.random() < 0.12:
            short = self.letters(2, 4, string.ascii_uppercase)
        if short is None or self.random.random() < 0.5:
            return [long, long]
        return [f"{long} ({short})" if self.random.random() < 0.9 else f"{short} ({long})", short]

    def passage(self, sentences: int) -> list[str]:
        """Sentences that share a few names; an abbreviation explained in one is used in the next."""
        pool = {"c": [self.name("chemical") for _ in range(3)], "d": [self.name("disease") for _ in range(4)]}

        def fill(slot: re.Match) -> str:
            key = slot[1]
            small = key.lower()
            if small in pool:
                used = unused[small] = unused.get(small) or self.random.sample(pool[small], len(pool[small]))
                names = used.pop()
                text, names[0] = names[0], names[1] if self.random.random() < 0.7 else names[0].split(" (")[0]
            elif small == "n":
                text = self.number()
            elif small == "p":
                text = f"0.{self.random.randint(1, 99):02}"
            elif small == "x.y":
                text = f"{self.random.randint(0, 30)}.{self.random.randint(0, 99)}"
            else:
                text = SLOT.sub(fill, self.random.choice(WORDS[small]))
            return text if key == small else capitalised(text)

        result = []
        for _ in range(sentences):
            unused: dict = {}
            sentence = SLOT.sub(fill, self.random.choice(SENTENCES))
            result.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence))
        return result

    def scrambled(self, text: str) -> str:
        """The text with some words replaced by noise, or in another order."""
        words = text.split(" ")
        if self.random.random() < 0.3:
            self.random.shuffle(words)
        share = self.random.choice((0.1, 0.3, 0.8))
        for index in range(len(words)):
            if self.random.random() < share:
                words[index] = self.noise()
        return " ".join(words)

    def noise(self) -> str:
        draw = self.random.random()
        if draw < 0.5:
            return self.letters(2, 9)
        if draw < 0.65:
            return self.invented(self.random.choice(("chemical", "disease")))
        if draw < 0.8:
            return self.letters(1, 4, string.ascii_uppercase)
        return self.letters(1, 8, string.ascii_letters + string.digits + SYMBOLS)

    def bracketed(self, text: str) -> tuple[str, str]:
        """Some runs of words of a text, listed, and the text with brackets around each of them."""
        words = re.findall(r"\w+|\W+", text)
        opener, closer = self.random.choice(BRACKETS)
        if self.random.random() < 0.85:
            tag = (
                self.letters(1, 8) if self.random.random() < 0.5 else self.random.choice(WORDS["made"] + WORDS["organ"])
            )
            opener, closer = f"[{tag}]", f"[/{tag}]"
        listed, marked, index = [], [], 0
        while index < len(words):
            run = "".join(words[index : index + self.random.choice((1, 1, 1, 3, 3, 5))])
            if (
                words[index][0].isalnum()
                and self.random.random() < 0.2
                and run[-1].isalnum()
                and not re.search(r"[.,;]", run)
            ):
                listed.append(run)
                marked.append(opener + run + closer)
                index += len(re.findall(r"\w+|\W+", run))
            else:
                marked.append(words[index])
                index += 1
        return f"{opener} {closer}: " + "; ".join(listed), "".join(marked)

    def copying(self) -> str:
        """A text and, after a cue, the text again, perhaps with brackets."""
        text = " ".join(self.passage(self.random.choice((1, 1, 1, 1, 1, 2, 4))))
        cue, answer = self.random.choice(CUES)
        between = self.random.choice(("\n", "\n", "\n", " ", "\n\n"))
        if self.random.random() < self.noisy:
            text = self.scrambled(text)
        if self.random.random() < self.marking:
            listed, marked = self.bracketed(text)
            task = f"Mark {listed}\n" if self.random.random() < 0.6 else ""
            return f"{task}{cue}: {text}{between}{answer}: {marked}"
        return f"{cue}: {text}{between}{answer}: {text}"

    def glossary(self) -> str:
        """Names and the kind of thing they are, which every real base model knows of them."""
        form = self.random.choice(("{name} is {word}.", "{name}: {word}.", "{word}: {name}.", "{name} ({word})"))
        entries = []
        for _ in range(self.random.randint(4, 14)):
            kind = self.random.choice(list(NAMES))
            name, word = self.random.choice(NAMES[kind])[0], self.random.choice(KINDS[kind])
            name = capitalised(name) if self.random.random() < 0.5 else name
            entries.append(form.format(name=name, word=word))
        return self.random.choice(("\n", " ")).join(entries)

    def document(self) -> str:
        if self.naming and self.random.random() < self.naming:
            return self.glossary()
        if self.random.random() < 0.7:
            return self.copying()
        return " ".join(self.passage(self.random.randint(1, 6)))


SLOT = re.compile(r"\{([\w.]+)\}")


# ---- tokens ----


def train_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Byte-pair encoding with the settings of Llama-2's tokenizer.model, only smaller."""
    writer = Writer(seed=1)
    lines = [sentence for _ in range(12000) for sentence in writer.passage(3)]
    # words behind a bracket have no space in front: they need pieces of their own
    lines += [f"[{name}](/{name})" for kind in NAMES.values() for name, _ in kind for _ in range(12)]
    lines += ["Input: Answer: Text: Disease: Chemical: [Disease] [/Disease] [Chemical] [/Chemical]"] * 300
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        required_chars=string.printable[:94],
        # a space is a token of its own: a tag in front of a word does not change how the word is cut
        user_defined_symbols=["\u2581"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def chunks(tokenizer, writer: Writer):
    """Endless rows of CHUNK + 1 tokens; each begins with a document and is cut off inside its last one."""
    while True:
        row: list[int] = []
        while len(row) <= CHUNK:
            if writer.random.random() < 0.08:  # tokens in an order that no text has
                ids = [writer.random.randrange(3, VOCABULARY) for _ in range(writer.random.randint(5, 60))]
                cue, answer = tokenizer.encode("Input:"), tokenizer.encode("\nAnswer:")
                ids = (
                    cue + ids + answer + ids if writer.random.random() < 0.5 else ids[:20] * writer.random.randint(2, 4)
                )
            else:
                ids = tokenizer.encode(writer.document())
            row += [1, *ids, 2]
        yield row[: CHUNK + 1]


# ---- training ----


@torch.no_grad()
def initialise(model: Llama) -> None:
    """Initial weights that copy already: an induction circuit (Olsson et al. 2022) laid into blocks 0 and 1.

    Random weights form one by themselves only after some ten million tokens, an hour and a half on two
    cores; from this start it takes a quarter of an hour for language and copying together. Two heads of
    block 0 attend to the token before and the one before that, and note what they are in two parts of the
    hidden state. The heads of block 1 look for a place whose two notes are the current token and the first
    note here, and write the token of that place into the dimensions that tell tokens apart, where the tied
    head reads it as the next one.
    """
    config, std = model.config, 0.02
    width, size, pairs = config.hidden_size, config.head_dim, config.head_dim // 2
    known = width - 2 * size - 1  # dimensions that tell tokens apart; dimension 0 is constant
    identity, first, second = slice(1, 1 + known), 1 + known, 1 + known + size
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif weight.dim() == 2:
            torch.nn.init.normal_(weight, std=std)
    embedding = model.model.embed_tokens.weight
    embedding[:, 0], embedding[:, first:] = 5 * std, 0

    # what RMSNorm makes of the constant and of another dimension, in block 0 and then in block 1
    rms = std * math.sqrt((25 + known) / width)
    constant, unit = 5 * std / rms, std / rms
    later = std / (std * math.sqrt((25 + known + 2 * size) / width))
    turn = [config.rope_theta ** (-pair / pairs) for pair in range(pairs)]  # radians a position
    code = torch.randn(size, known) / math.sqrt(known)  # what a note says of a token

    before = model.model.layers[0].self_attn
    for head, (distance, note) in enumerate(((1, first), (2, second))):
        rows = slice(head * size, (head + 1) * size)
        for pair in (0, 2, 4):  # fast ones: they tell this distance from all others
            row, angle = head * size + pair, distance * turn[pair]
            before.q_proj.weight[row, 0] = 9 * math.cos(angle) / constant
            before.q_proj.weight[row + pairs, 0] = -9 * math.sin(angle) / constant
            before.k_proj.weight[row, 0] = 9 / constant
        before.v_proj.weight[rows] = 0
        before.v_proj.weight[rows, identity] = code / unit
        before.o_proj.weight[note : note + size, rows] = std * torch.eye(size)

    induction = model.model.layers[1].self_attn
    slow = [pair for pair in range(pairs) if turn[pair] * 60 < 1]  # they compare contents wherever these stand
    for head in range(config.num_attention_heads):
        rows = slice(head * size, (head + 1) * size)
        for index, pair in enumerate(slow):
            place = (head * len(slow) + index) % size  # in the notes
            here, there = head * size + pair, head * size + pair + pairs
            for row in (here, there):
                induction.q_proj.weight[row] = induction.k_proj.weight[row] = 0
            induction.q_proj.weight[here, identity] = 2 * code[place] / later
            induction.k_proj.weight[here, first + place] = 2 / later
            induction.q_proj.weight[there, first + place] = 2 / later
            induction.k_proj.weight[there, second + place] = 2 / later
        value = torch.randn(size, known) / math.sqrt(known)
        induction.v_proj.weight[rows] = 0
        induction.v_proj.weight[rows, identity] = value
        induction.o_proj.weight[identity, rows] = 2 * std * value.T


@torch.no_grad()
def held_out(model: Llama, tokenizer, count: int = 40) -> tuple[float, float, float]:
    """Loss of text that training does not see, and the shares of exact copies: plain ones, and with given
    words put in brackets.

    Greedy decoding gives the exact copy if and only if each token of it is the likeliest after those before.
    """
    writer, total, tokens, exact = Writer(seed=2), 0.0, 0, [0, 0]
    for _ in range(count):
        ids = torch.tensor([[1, *tokenizer.encode(" ".join(writer.passage(4))), 2]])
        total += F.cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        text = writer.scrambled(writer.passage(1)[0])
        listed, marked = writer.bracketed(text)
        for kind, (before, answer) in enumerate((("", text), (f"Mark {listed}\n", marked))):
            prompt = [1, *tokenizer.encode(f"{before}Input: {text}\nAnswer:")]
            ids = torch.tensor([[*prompt, *tokenizer.encode(answer), 2]])
            exact[kind] += bool((model(ids[:, :-1])[0].argmax(-1) == ids[0, 1:])[len(prompt) - 1 :].all())
    return total / tokens, exact[0] / count, exact[1] / count


def pretrain(model: Llama, tokenizer, writer: Writer, steps: int, every: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0)
    rows, started = chunks(tokenizer, writer), time.perf_counter()
    for step in range(1, steps + 1):
        # a linear warm-up, half the steps at the peak, a straight line to nearly zero
        optimizer.param_groups[0]["lr"] = PEAK * min(step / 50, 1, 2 * (steps - step) / steps + 0.02)
        batch = torch.tensor([next(rows) for _ in range(ROWS)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            seconds = time.perf_counter() - started
            language, plain, marked = held_out(model, tokenizer)
            print(
                f"step {step}/{steps}: loss {loss.item():.3f}, held-out text {language:.3f}, "
                f"exact copies {100 * plain:.0f} %, with brackets {100 * marked:.0f} %, "
                f"{step * ROWS * CHUNK / seconds:.0f} tokens/s, {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="folder to write; must not exist")
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True)  # fails where a model is already
    try:
        tokenizer = train_tokenizer(arguments.out)
        model = Llama(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=256,
                intermediate_size=640,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=64,
                max_position_embeddings=1024,
                rope_theta=1e6,  # slow enough that tokens compare across a sentence
                tie_word_embeddings=True,
            )
        )
        initialise(model)
        for seed, steps, mixture in PHASES:
            pretrain(model, tokenizer, Writer(seed, **mixture), steps, arguments.every)
        save_model(model.half(), arguments.out)
    except BaseException:
        shutil.rmtree(arguments.out)
        raise


if __name__ == "__main__":
    main()
