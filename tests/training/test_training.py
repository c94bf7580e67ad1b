"""One training step against plain formulas, and against transformers + peft + torch's own AdamW."""

import math
from pathlib import Path

import pytest
import torch
from helpers import (
    close,
    copy_to_peft,
    peft_model,
    peft_pairs,
    random_ids,
    randomise_lora,
    tiny_model,
    transformers_twin,
)
from torch.nn import functional as F

from llamalora.distributed.world import World
from llamalora.lora.inject import inject_lora, lora_layers, train_weights, trainable_parameters
from llamalora.lora.kinds import KINDS
from llamalora.model.precision import DTYPES, autocast, choose_precision
from llamalora.runs.state import load_checkpoint, save_checkpoint
from llamalora.training import step as training_step
from llamalora.training.batch import Example, MicroBatch, deal
from llamalora.training.step import DivergedError, MovementCheck, Optimizer, backward, learning_rate

CPU = torch.device("cpu")
ALONE = World()
# (tokens, of them the prompt): answers of very unequal length, so that a mean of means would show
SHAPES = ((12, 8), (30, 5), (9, 8), (40, 38), (17, 2), (3, 1))
EXAMPLES = [Example(tuple(random_ids(n, seed=n).tolist()), prompt) for n, prompt in SHAPES]
LENGTHS = [len(example) for example in EXAMPLES]
SUPERVISED = sum(example.supervised for example in EXAMPLES)
EVERY = (range(len(EXAMPLES)),)  # one micro-batch of all
METHODS = ["lora", "dora", "partial", "full"]


def trainee(method="lora", targets="all", filled=True, **shape):
    model = tiny_model(**shape)
    if method in ("lora", "dora"):
        inject_lora(model, targets, 4, dora=method == "dora")
        if filled:
            randomise_lora(model)
    if method == "partial":
        train_weights(model, targets)
    return model.train()


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def batches(groups):
    return [MicroBatch.of([EXAMPLES[index] for index in group], CPU) for group in groups]


def gradients(model, groups=EVERY, precision="fp32", scaler=None, **options):
    """The loss of a step over these micro-batches, and the gradients that it leaves, unscaled."""
    scaler = scaler or no_scaler()
    loss = sum(backward(model, batch, SUPERVISED, scaler, precision, **options).item() for batch in batches(groups))
    scale = scaler.get_scale()
    found = {name: parameter.grad / scale for name, parameter in trainable_parameters(model).items()}
    model.zero_grad()
    return loss, found


def plain_gradients(model):
    """The same by definition: each example alone, unpacked, whole logits, one mean over supervised tokens."""
    total = 0.0
    for example in EXAMPLES:
        logits = model(torch.tensor([example.ids[:-1]]))[0]
        probabilities = logits.log_softmax(-1)
        total = total - sum(
            probabilities[place - 1, example.ids[place]] for place in range(example.prompt, len(example.ids))
        )
    loss = total / SUPERVISED
    loss.backward()
    found = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    model.zero_grad()
    return loss.item(), found


def distance(found, reference):
    """Of all gradients together, relative to their norm."""
    assert found.keys() == reference.keys()
    apart = math.sqrt(sum((found[name] - reference[name]).pow(2).sum().item() for name in reference))
    return apart / math.sqrt(sum(gradient.pow(2).sum().item() for gradient in reference.values()))


# ---- the loss ----


@pytest.mark.parametrize("method, targets, tied", [
    ("lora", "all", False),
    ("lora", "all", True),
    ("lora", "head", False),
    ("lora", "embed", True),
    ("lora", "q,v", False),
    ("partial", "q,down", False),
    ("partial", "head", True),
    ("full", "all", False),
    ("full", "all", True),
])  # fmt: skip
def test_the_loss_is_the_mean_over_supervised_tokens(method, targets, tied):
    model = trainee(method, targets, tie_word_embeddings=tied)
    expected, reference = plain_gradients(model)
    loss, found = gradients(model)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(found, reference) < 1e-5
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [
    [[0], [1], [2], [3], [4], [5]],
    [[5, 0], [3, 1, 4], [2]],
    *[[batch for share in deal(range(6), LENGTHS, ranks, 50) for batch in share if batch] for ranks in (1, 3)],
])  # fmt: skip
def test_micro_batches_change_no_gradient(method, groups):
    model = trainee(method)
    assert sorted(index for group in groups for index in group) == list(range(6))
    whole_loss, whole = gradients(model)
    loss, found = gradients(model, groups)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert distance(found, whole) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_chunked_head_is_the_whole_head(method, monkeypatch):
    model = trainee(method)
    whole_loss, whole = gradients(model)
    for tokens in (1, 7, SUPERVISED - 1):
        monkeypatch.setattr(training_step, "LOGITS_AT_ONCE", tokens * 97)
        loss, found = gradients(model)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert distance(found, whole) < 1e-5


def test_the_head_holds_one_chunk_of_logits_at_a_time(monkeypatch):
    model, seen = trainee("full"), []
    monkeypatch.setattr(training_step, "LOGITS_AT_ONCE", 7 * 97)
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    gradients(model)
    assert max(seen) == 7 and sum(seen) == SUPERVISED  # and only supervised positions at all


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_no_gradient(method):
    model = trainee(method)
    (loss, found), (again, recomputed) = gradients(model), gradients(model, recompute=True)
    assert loss == again
    assert all(torch.equal(found[name], recomputed[name]) for name in found)


# ---- precision ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision, tolerance", [("fp16", 0.02), ("bf16", 0.1)])
@pytest.mark.parametrize("frozen", ["fp32 base", "half base"])
def test_half_precision_gradients_are_near_fp32(method, precision, tolerance, frozen):
    model = trainee(method)
    loss, exact = gradients(model)
    if frozen == "half base":
        if method in ("partial", "full"):
            pytest.skip("full and partial fine-tuning keep their weights in fp32")
        for layer in lora_layers(model).values():
            layer.weight.data = layer.weight.data.to(DTYPES[precision])
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    rough, found = gradients(model, precision=precision, scaler=scaler)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert rough == pytest.approx(loss, rel=tolerance)
    assert 1e-5 < distance(found, exact) < tolerance  # it did compute in half precision


def test_precision_is_chosen_with_a_reason():
    assert choose_precision("fp16", CPU) == ("fp16", "requested")
    chosen, why = choose_precision("auto", CPU)
    assert chosen in ("fp32", "bf16") and "CPU" in why
    with autocast("fp32", CPU):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("bf16", CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")


# ---- the schedule ----


@pytest.mark.parametrize("total, warmup", [(100, 10), (100, 0), (7, 3), (1, 0), (1, 1), (10, 10)])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(total, warmup):
    rates = [learning_rate(2.0, update, total, warmup, "cosine") for update in range(total)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([2.0 * (n + 1) / warmup for n in range(warmup)])
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 2.0
        middle = warmup + (total - warmup) / 2
        assert learning_rate(2.0, middle, total, warmup, "cosine") == pytest.approx(1.0)
        assert learning_rate(2.0, total, total, warmup, "cosine") == pytest.approx(0.0)  # where a next would be
    constant = [learning_rate(2.0, update, total, warmup, "constant") for update in range(total)]
    assert constant == pytest.approx(rising + [2.0] * (total - warmup))


# ---- the optimizer ----


def step(model, optimizer, lr=1e-2, precision="fp32", groups=EVERY):
    loss = sum(backward(model, batch, SUPERVISED, optimizer.scaler, precision).item() for batch in batches(groups))
    return loss, optimizer.step(lr, ALONE)


def snapshot(optimizer):
    return {name: tensor.detach().clone() for name, tensor in optimizer.state()[0].items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls(method, precision):
    model = trainee(method, filled=False)
    optimizer = Optimizer(model, precision, CPU, weight_decay=0.0, clip=1.0)
    losses = [step(model, optimizer, 2e-2 if method in ("lora", "dora") else 3e-3, precision)[0] for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_norm_is_of_all_gradients_and_is_clipped():
    model = trainee()
    _, found = gradients(model)
    norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in found.values()))
    for clip in (0.0, norm / 3, 3 * norm):
        model = trainee()
        optimizer = Optimizer(model, "fp32", CPU, 0.0, clip)
        _, update = step(model, optimizer)
        assert update.grad_norm == pytest.approx(norm, rel=1e-5) and not update.skipped
        first = math.sqrt(sum(state["exp_avg"].pow(2).sum().item() for state in optimizer.adam.state.values())) / 0.1
        assert first == pytest.approx(min(norm, clip or math.inf), rel=1e-4)  # what Adam was given


def test_scaling_the_loss_changes_no_update():
    """fp16's scaler around fp32 arithmetic: unscaled before clipping, so the step is the same."""
    plain, scaled = trainee(), trainee()
    one = Optimizer(plain, "fp32", CPU, 0.01, 0.5)
    other = Optimizer(scaled, "fp16", CPU, 0.01, 0.5)
    assert other.scaler.get_scale() > 1
    for _ in range(3):
        (_, first), (_, second) = step(plain, one), step(scaled, other)
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)
    for name, parameter in trainable_parameters(plain).items():
        close(trainable_parameters(scaled)[name], parameter, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(value, precision):
    model = trainee()
    optimizer = Optimizer(model, precision, CPU, weight_decay=0.1, clip=1.0)
    step(model, optimizer, precision=precision)
    before, scale = snapshot(optimizer), optimizer.scaler.get_scale()
    assert any(name.startswith("exp_avg.") for name in before)

    backward(model, batches([[0]])[0], SUPERVISED, optimizer.scaler, precision)
    optimizer.parameters["lm_head.lora_A"].grad[0, 0] = value
    update = optimizer.step(1e-2, ALONE)
    assert update.skipped and not math.isfinite(update.grad_norm)
    after = snapshot(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in optimizer.parameters.values())
    assert optimizer.scaler.get_scale() == (scale / 2 if precision == "fp16" else scale)

    _, update = step(model, optimizer, precision=precision)  # and training goes on
    assert not update.skipped
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(optimizer).values())
    assert not torch.equal(snapshot(optimizer)["parameter.lm_head.lora_A"], before["parameter.lm_head.lora_A"])


def spoil(model, optimizer, precision="fp32"):
    backward(model, batches([[0]])[0], SUPERVISED, optimizer.scaler, precision)
    optimizer.parameters["lm_head.lora_A"].grad[0, 0] = math.nan
    return optimizer.step(1e-2, ALONE)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_storm_of_skipped_steps_ends_the_run(precision):
    model = trainee(targets="head")
    optimizer = Optimizer(model, precision, CPU, 0.0, 1.0)
    for _ in range(Optimizer.MOST_SKIPS - 1):
        assert spoil(model, optimizer, precision).skipped
    step(model, optimizer, precision=precision)  # a good one in between starts the count anew
    for _ in range(Optimizer.MOST_SKIPS - 1):
        spoil(model, optimizer, precision)
    with pytest.raises(DivergedError, match=f"{Optimizer.MOST_SKIPS} steps in a row.*--lr"):
        spoil(model, optimizer, precision)


def test_overflow_of_fp16_is_survived():
    """A scale that is far too large overflows, is halved until it fits, and then trains."""
    model = trainee()
    optimizer = Optimizer(model, "fp16", CPU, 0.0, 1.0)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    updates = [step(model, optimizer, precision="fp16")[1] for _ in range(32)]
    skips = [update.skipped for update in updates]
    assert skips[0] and not skips[-1]
    assert skips == sorted(skips, reverse=True)
    assert all(math.isfinite(update.grad_norm) for update in updates if not update.skipped)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loraplus_is_a_rate_of_its_own_for_every_b_but_the_embeddings(method):
    """Adam's first step is the learning rate wherever there is a gradient."""
    model = trainee(method)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    step(model, Optimizer(model, "fp32", CPU, 0.0, 1.0, loraplus=8.0), lr=1e-3)
    for name, parameter in trainable_parameters(model).items():
        moved = (parameter - before[name]).abs().max().item()
        fast = name.endswith("lora_B") and "embed" not in name
        assert moved == pytest.approx(8e-3 if fast else 1e-3, rel=0.02), name


@pytest.mark.parametrize("targets", ["embed", "head"])
def test_loraplus_where_one_of_its_rates_has_no_parameter(targets):
    model = trainee(targets=targets)
    assert not step(model, Optimizer(model, "fp16", CPU, 0.0, 1.0, loraplus=8.0), precision="fp16")[1].skipped


# ---- resuming ----


@pytest.mark.parametrize("method, loraplus", [("lora", 1), ("lora", 8.0), ("dora", 8.0), ("partial", 1), ("full", 1)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("updates", [0, 3])
def test_resumed_is_uninterrupted(method, loraplus, precision, updates, tmp_path):
    """Through the files of a checkpoint, bitwise; with a skipped step in the history."""

    def run(model, optimizer, steps):
        for number in steps:
            if number == 1 and method in ("lora", "dora"):
                spoil(model, optimizer, precision)
            step(model, optimizer, 1e-2 / (number + 1), precision)

    model = trainee(method)
    optimizer = Optimizer(model, precision, CPU, 0.01, 1.0, loraplus)
    run(model, optimizer, range(updates))
    save_checkpoint(tmp_path, updates, *optimizer.state(), keep=1)
    run(model, optimizer, range(updates, 5))

    resumed = trainee(method)
    with torch.no_grad():
        for parameter in trainable_parameters(resumed).values():
            parameter.add_(1)
    other = Optimizer(resumed, precision, CPU, 0.01, 1.0, loraplus)
    other.load_state(*load_checkpoint(tmp_path))
    run(resumed, other, range(updates, 5))
    expected, found = snapshot(optimizer), snapshot(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert optimizer.state()[1] == other.state()[1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says what a process has mapped, on Linux alone")
def test_a_resumed_optimizer_keeps_nothing_of_the_file(tmp_path):
    """Pages of a mapped file count as the process's memory: of a rank of 128 on all of 7B, 3.7 GiB."""
    model = trainee("lora")
    optimizer = Optimizer(model, "fp32", CPU, 0.01, 1.0)
    step(model, optimizer, 1e-2, "fp32")
    save_checkpoint(tmp_path, 1, *optimizer.state(), keep=1)
    mapped = load_checkpoint(tmp_path)[0]["parameter.model.layers.0.self_attn.q_proj.lora_A"]
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del mapped
    optimizer.load_state(*load_checkpoint(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# ---- what never moves ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_moves(method, tied):
    model = trainee(method, filled=False, tie_word_embeddings=tied)
    optimizer = Optimizer(model, "fp32", CPU, 0.0, 1.0)
    check = MovementCheck(optimizer.parameters)
    for _ in range(MovementCheck.UPDATES):
        step(model, optimizer)
    check(ALONE)


def test_a_parameter_that_cannot_move_is_named():
    model = trainee(filled=False)
    layer = model.model.layers[1].self_attn.q_proj
    layer.register_forward_hook(lambda layer, given, _: F.linear(*given, layer.weight))  # the update counts for nothing
    optimizer = Optimizer(model, "fp32", CPU, 0.0, 1.0)
    check = MovementCheck(optimizer.parameters)
    for _ in range(MovementCheck.UPDATES):
        step(model, optimizer)
    with pytest.raises(DivergedError) as caught:
        check(ALONE)
    named = str(caught.value).rpartition(": ")[2].split(", ")
    assert named == ["model.layers.1.self_attn.q_proj.lora_A", "model.layers.1.self_attn.q_proj.lora_B"]


def test_a_model_that_stands_still_is_cut_in_the_message():
    model = trainee()
    check = MovementCheck(trainable_parameters(model))
    with pytest.raises(DivergedError, match="and 26 more"):
        check(ALONE)


# ---- against transformers, peft and torch ----


def padded(indices):
    """Examples as the rectangle that transformers wants: right-padded, everything but answers masked."""
    rows = [EXAMPLES[index] for index in indices]
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        labels[place, row.prompt : len(row.ids)] = torch.tensor(row.ids[row.prompt :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("method, targets, tied, loraplus", [
    ("lora", "all", False, 1), ("lora", "all", True, 1), ("lora", "q,v", False, 1),
    ("lora", "all", True, 4.0), ("lora", "q,v", False, 8.0), ("dora", "all", False, 1), ("dora", "all", True, 1),
])  # fmt: skip
def test_five_steps_of_adamw_are_those_of_transformers_and_peft(method, targets, tied, loraplus):
    """With LoRA+ the optimizer is peft's own, its constant rate for the embedding replaced by A's."""
    from peft.optimizers import create_loraplus_optimizer

    model = trainee(method, targets, filled=False, tie_word_embeddings=tied)
    base = transformers_twin(tiny_model(tie_word_embeddings=tied))
    names = {name.rpartition(".")[2] for name in lora_layers(model)}
    assert names <= set(KINDS.values())
    theirs = peft_model(base, sorted(names), 4, 4.0, use_dora=method == "dora")
    copy_to_peft(model, theirs)
    initial = {name: layer.lora_B.detach().clone() for name, layer in lora_layers(model).items()}
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adam = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=loraplus, loraplus_lr_embedding=1.0,
        loraplus_weight_decay=0.01,
    )  # fmt: skip
    rates = [group["lr"] for group in adam.param_groups]
    ours = Optimizer(model, "fp32", CPU, weight_decay=0.01, clip=0.5, loraplus=loraplus)

    for number, indices in enumerate([(0, 1, 2), (3, 4), (5, 0), (1, 2, 3, 4, 5), (2, 4)]):
        lr = learning_rate(5e-3, number, 5, 2, "cosine")
        supervised = sum(EXAMPLES[index].supervised for index in indices)
        batches_of_one = batches([[i] for i in indices])
        loss = sum(backward(model, batch, supervised, ours.scaler, "fp32").item() for batch in batches_of_one)
        update = ours.step(lr, ALONE)

        reference = theirs(**padded(indices)).loss
        reference.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * lr
        adam.step()
        adam.zero_grad()
        assert loss == pytest.approx(reference.item(), rel=1e-4)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-3)

    for name, parts in peft_pairs(theirs).items():
        layer = lora_layers(model)[name]
        assert (layer.lora_B - initial[name]).abs().max() > 5e-3
        for actual, expected in zip(layer.parts, parts, strict=True):
            # Adam divides by the gradient's size, so where it is all rounding the step is, too: compare the whole
            assert (actual - expected).norm() < 1e-3 * expected.norm()


def test_cross_entropy_is_in_nats():
    """Of logits that are all equal: log of the vocabulary."""
    model = trainee("full")
    torch.nn.init.zeros_(model.lm_head.weight)
    loss, _ = gradients(model)
    assert loss == pytest.approx(math.log(97), rel=1e-5)
    assert loss == pytest.approx(F.cross_entropy(torch.zeros(1, 97), torch.tensor([0])).item(), rel=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_cross_entropy_in_blocks_is_torchs(dtype, tolerance, rows, monkeypatch):
    """Also where the model is as wrong as can be, and the target's probability is below what fp32 can hold."""
    monkeypatch.setattr(training_step, "SOFTMAX_AT_ONCE", (rows * 50,) * 2)
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2)).mul(8).to(dtype)
    targets = torch.tensor([3, 0, 49, 7, 7, 20, 1])
    logits[2, 49], logits[3, 7] = -300, 300
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    before = logits.clone()
    loss, gradient = training_step._cross_entropy(logits, targets, torch.tensor(0.25))
    assert expected > 300 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == dtype
    assert (gradient - 0.25 * exact.grad).abs().max() < tolerance
    assert torch.equal(logits, before)
