"""What `inspect` says of an adapter, against decompositions of the explicit product; and what it refuses."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from helpers import peft_model, peft_pairs, randomise_lora, tiny_config, tiny_model, transformers_twin
from safetensors.torch import load_file, save_file

from llamalora.__main__ import main
from llamalora.cli import run_command
from llamalora.commands import inspect
from llamalora.inspection import analysis, spectrum
from llamalora.inspection.analysis import METRICS, Matrix, by_kind
from llamalora.lora.adapter import save_adapter
from llamalora.lora.inject import inject_lora, lora_layers
from llamalora.lora.kinds import KINDS
from llamalora.lora.peft_format import read_adapter
from llamalora.model.checkpoint import save_model
from llamalora.model.tensors import CheckpointError
from llamalora.runs.settings import Settings
from llamalora.runs.state import write_atomically

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WEIGHTS = "adapter_model.safetensors"


def adapted(targets="all", rank=4, seed=1, tied=False, **options):
    model = tiny_model(tie_word_embeddings=tied)
    inject_lora(model, targets, rank, **options)
    randomise_lora(model, seed)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    """A base model, an adapter of all kinds, a second one of some, and the adapted model itself."""
    root = tmp_path_factory.mktemp("adapters")
    save_model(tiny_model(tie_word_embeddings=request.param), root / "base")
    model = adapted(alpha=6.0, rslora=True, tied=request.param)
    save_adapter(model, root / "one")
    save_adapter(adapted("q,down,embed", rank=3, seed=2, tied=request.param), root / "two")
    return root, model


@pytest.fixture(scope="module")
def inspected(folders):
    """Everything at once: base model, its spectra, a second adapter."""
    root, _ = folders
    adapter = read_adapter(root / "one")
    found = analysis.measure(adapter, root / "base", read_adapter(root / "two"), adapter.layers, top=5, epsilon=0.9)
    return {matrix.name: matrix for matrix in found}


# ---- against the explicit product ----


def explicit(layer) -> tuple[np.ndarray, np.ndarray]:
    """W0 and scale * B A in fp64, as the layer itself computes it."""
    return layer.weight.detach().double().numpy(), layer.delta().detach().double().numpy()


def test_every_layer_is_there_with_its_place(folders, inspected):
    _, model = folders
    layers = lora_layers(model)
    assert inspected.keys() == layers.keys()
    for name, matrix in inspected.items():
        assert matrix.shape == tuple(layers[name].weight.shape)
        assert (matrix.rank, matrix.scale) == (4, 3.0) == (layers[name].rank, layers[name].scale)
        assert KINDS[matrix.kind] == name.rpartition(".")[2]
        assert matrix.layer == (int(name.split(".")[2]) if "layers" in name else None)


def test_norm_and_singular_values(folders, inspected):
    for name, layer in lora_layers(folders[1]).items():
        _, delta = explicit(layer)
        S = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(inspected[name].singular_values, S[:4], rtol=1e-5)
        assert S[4] < 1e-5 * S[0] and len(inspected[name].singular_values) == 4
        assert inspected[name].norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)


def test_ranks(inspected):
    for matrix in inspected.values():
        S = np.array(matrix.singular_values)
        p = S / S.sum()
        assert matrix.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
        assert matrix.used == pytest.approx(matrix.effective_rank / 4)
        assert matrix.stable_rank == pytest.approx((S**2).sum() / S.max() ** 2)
        enough = [n for n in range(1, 5) if (S[:n] ** 2).sum() >= 0.99 * (S**2).sum()]
        assert matrix.energy_rank == enough[0]


def test_figures_against_the_base(folders, inspected):
    """Hu et al. 2022, section 7.3, with the singular vectors of the explicit product."""
    for name, layer in lora_layers(folders[1]).items():
        W, delta = explicit(layer)
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        projected = np.linalg.norm(U[:, :4].T @ W @ Vh[:4].T)
        found = inspected[name]
        assert found.base_norm == pytest.approx(np.linalg.norm(W), rel=1e-5)
        assert found.ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W), rel=1e-5)
        assert found.projected == pytest.approx(projected, rel=1e-4)
        assert found.amplification == pytest.approx(np.linalg.norm(delta) / projected, rel=1e-4)


def test_figures_against_the_spectrum_of_the_base(folders, inspected):
    for name, layer in lora_layers(folders[1]).items():
        W, delta = explicit(layer)
        U0, S0, V0h = np.linalg.svd(W, full_matrices=False)
        U, _, Vh = np.linalg.svd(delta, full_matrices=False)
        found = inspected[name]
        np.testing.assert_allclose(found.base_singular_values, S0[:4], rtol=1e-4)
        assert found.overlap_left == pytest.approx(np.linalg.norm(U0[:, :4].T @ U[:, :4]) ** 2 / 4, abs=1e-4)
        assert found.overlap_right == pytest.approx(np.linalg.norm(V0h[:4] @ Vh[:4].T) ** 2 / 4, abs=1e-4)
        assert found.overlap_sizes[0] == 1 and found.overlap_sizes[-1] == len(S0)
        for size, left in zip(found.overlap_sizes, found.overlap_left_curve, strict=True):
            assert left == pytest.approx(np.linalg.norm(U0[:, :size].T @ U[:, :4]) ** 2 / 4, abs=1e-4)
        U1 = np.linalg.svd(W + delta, full_matrices=False)[0]
        cosines = np.abs(U0.T @ U1[:, :5]).max(axis=0)
        np.testing.assert_allclose(found.intruder_cosines, cosines, atol=2e-3)
        assert found.intruders == sum(cosine < 0.9 for cosine in found.intruder_cosines)
    assert any(matrix.intruders for matrix in inspected.values())


def phi(X: np.ndarray, Y: np.ndarray, i: int, j: int) -> float:
    """Hu et al.'s phi by principal angles: the mean squared cosine between the two subspaces."""
    cosines = np.linalg.svd(X[:, :i].T @ Y[:, :j], compute_uv=False)
    return float((cosines**2).sum() / min(i, j))


def test_similarity_of_two_adapters(folders, inspected):
    root, _ = folders
    one, two = (load_file(root / name / WEIGHTS) for name in ("one", "two"))
    for name, found in inspected.items():
        if found.kind not in ("q", "down", "embed"):
            assert found.phi_A is None and found.similarity_B is None
            continue
        pattern = "lora_embedding_{}" if found.kind == "embed" else "lora_{}.weight"
        for factor in "AB":
            key = f"base_model.model.{name}.{pattern.format(factor)}"
            X, Y = (t[key].double().numpy() for t in (one, two))
            X, Y = (np.linalg.svd(t.T if factor == "A" else t, full_matrices=False)[0] for t in (X, Y))
            expected = [[phi(X, Y, i, j) for j in range(1, 4)] for i in range(1, 5)]
            np.testing.assert_allclose(getattr(found, f"phi_{factor}"), expected, atol=1e-5)
            assert getattr(found, f"similarity_{factor}") == pytest.approx(expected[-1][-1])


def test_without_a_base_model_the_update_is_the_same(folders, inspected):
    for matrix in analysis.measure(read_adapter(folders[0] / "one")):
        both = inspected[matrix.name]
        np.testing.assert_allclose(matrix.singular_values, both.singular_values, rtol=1e-10)
        assert matrix.effective_rank == pytest.approx(both.effective_rank)
        assert matrix.ratio is matrix.intruders is matrix.phi_A is None


def test_by_kind(inspected):
    kinds = by_kind(inspected.values())
    assert list(kinds) == list(KINDS)
    values = sorted(matrix.norm for matrix in inspected.values() if matrix.kind == "q")
    assert kinds["q"]["norm"] == {"median": sum(values) / 2, "least": values[0], "largest": values[1]}
    assert kinds["q"]["count"] == 2 and kinds["q"]["parameters"] == 2 * 4 * (32 + 32)
    assert kinds["embed"]["parameters"] == 4 * (97 + 32)
    assert "similarity_A" not in kinds["v"] and "similarity_A" in kinds["q"]
    assert {"norm", "ratio", "intruders", "similarity_B"} <= set(METRICS) and "layer" not in METRICS


# ---- cases whose answer is known ----


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def test_a_product_with_given_singular_values():
    """Also where the rank exceeds a side of the weight."""
    for rows, columns, rank in ((40, 30, 6), (5, 30, 8), (30, 5, 8), (4, 3, 8)):
        count = min(rows, columns, rank)
        S = torch.logspace(0, -5, count, dtype=torch.float64)
        mixing = torch.randn(count, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        left = orthonormal(rows, count) * S @ mixing
        right = torch.linalg.pinv(mixing) @ orthonormal(columns, count, seed=2).T
        torch.testing.assert_close(spectrum.singular_values(left, right, -2.0), 2 * S, rtol=1e-8, atol=1e-14)
        U, found, Vh = spectrum.decompose(left, right, 2.0)
        torch.testing.assert_close(found, 2 * S, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(U * found @ Vh, 2 * left @ right)
        torch.testing.assert_close(U.T @ U, torch.eye(count, dtype=torch.float64))


def test_ranks_of_known_spectra():
    equal, single = torch.full((5,), 3.0), torch.tensor([2.0, 0, 0])
    assert spectrum.effective_rank(equal) == pytest.approx(5) and spectrum.effective_rank(single) == 1
    assert spectrum.stable_rank(equal) == pytest.approx(5) and spectrum.stable_rank(single) == 1
    assert spectrum.energy_rank(equal) == 5 and spectrum.energy_rank(single) == 1
    steep = torch.tensor([10.0, 1.0, 0.1])
    assert spectrum.energy_rank(steep, 0.99) == 1 and spectrum.energy_rank(steep, 0.9999) == 2
    for scale in (1e-30, 1e30):
        assert spectrum.effective_rank(steep.double() * scale) == pytest.approx(spectrum.effective_rank(steep))
        assert spectrum.energy_rank(steep * scale) == 1 and spectrum.stable_rank(steep * scale) < 1.1


def test_similarity_of_equal_nested_and_orthogonal_subspaces():
    Q = orthonormal(20, 6)
    same = spectrum.subspace_similarity(Q, Q)
    torch.testing.assert_close(same.diagonal(), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(same, torch.ones(6, 6, dtype=torch.float64))  # one always holds the other
    assert spectrum.subspace_similarity(Q[:, :2], Q[:, 3:]).abs().max() < 1e-20
    half = spectrum.subspace_similarity(Q[:, :2], Q[:, 1:3])
    assert half[1, 1] == pytest.approx(0.5) and half[0, 1] == pytest.approx(0, abs=1e-20)
    turned = Q @ orthonormal(6, 6, seed=3)
    assert spectrum.subspace_similarity(Q, turned)[-1, -1] == pytest.approx(1)


def test_similarity_of_an_adapter_with_itself(folders):
    adapter = read_adapter(folders[0] / "two")
    for matrix in analysis.measure(adapter, other=adapter):
        assert matrix.similarity_A == pytest.approx(1) and matrix.similarity_B == pytest.approx(1)
        np.testing.assert_allclose(matrix.phi_B, np.ones((3, 3)), atol=1e-5)


def test_directions_that_do_not_exist_resemble_nothing():
    X = orthonormal(20, 2) @ torch.randn(2, 4, dtype=torch.float64)
    found = spectrum.directions(X)
    assert found.shape == (20, 4) and not found[:, 2:].any()
    assert spectrum.subspace_similarity(found, spectrum.directions(torch.zeros(20, 3, dtype=X.dtype))).sum() == 0


def test_a_planted_intruder_is_found():
    """Of a strong new direction, a strengthened old one, and a weak new one, only the first is an intruder."""
    U0, V0 = orthonormal(30, 30).float(), orthonormal(24, 24, seed=2).float()
    S0 = torch.linspace(10, 1, 24)
    weight = U0[:, :24] * S0 @ V0.T
    mixture = U0[:, :24].mean(1, keepdim=True) * 24**0.5  # every one of W0's directions a little
    row = V0.mean(1, keepdim=True).T * 24**0.5
    for update, count in ((100 * mixture @ row, 1), (100 * U0[:, 3:4] @ V0[:, 3:4].T, 0), (0.01 * mixture @ row, 0)):
        cosines = spectrum.intruder_cosines(weight, U0[:, :24], update, top=10)
        assert len(cosines) == 10 and int((cosines < 0.5).sum()) == count


def test_an_update_inside_and_outside_of_the_bases_leading_subspace():
    U0, V0 = orthonormal(30, 20), orthonormal(20, 20, seed=2)
    weight = (U0 * torch.linspace(10, 1, 20) @ V0.T).float()
    for chosen, overlap in ((slice(0, 3), 1), (slice(10, 13), 0), (slice(2, 5), 1 / 3)):
        S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        found = analysis.compare_with_spectrum(weight, U0[:, chosen], S, V0[:, chosen].T, 3, 10, 0.5)
        assert found["overlap_left"] == pytest.approx(overlap, abs=1e-4)
        assert found["overlap_right"] == pytest.approx(overlap, abs=1e-4)
        # U^T W0 V is the diagonal of the chosen singular values
        base = analysis.compare_with_base(weight, U0[:, chosen], S, V0[:, chosen].T)
        expected = torch.linspace(10, 1, 20)[chosen].norm()
        assert base["projected"] == pytest.approx(float(expected), rel=1e-4)


def test_an_update_of_zero(tmp_path):
    """As LoRA starts; zeros everywhere, never NaN, and no intruder."""
    model = tiny_model()
    inject_lora(model, "q,embed,head", 4)
    save_adapter(model, tmp_path / "zero")
    save_model(tiny_model(), tmp_path / "base")
    adapter = read_adapter(tmp_path / "zero")
    for found in analysis.measure(adapter, tmp_path / "base", adapter, adapter.layers):
        assert found.norm == found.effective_rank == found.stable_rank == found.energy_rank == found.used == 0
        assert found.ratio == found.amplification == found.projected == found.intruders == found.overlap_left == 0
        assert found.singular_values == [0] * 4 and min(found.intruder_cosines) > 0.99
        # of the embedding, B is what starts as a random draw
        assert found.similarity_A == pytest.approx(0 if found.kind == "embed" else 1)
        assert found.similarity_B == pytest.approx(1 if found.kind == "embed" else 0)
        json.dumps(vars(found), allow_nan=False)


# ---- adapters of peft, and bad ones ----


def test_adapters_of_peft(tmp_path):
    theirs = peft_model(
        transformers_twin(tiny_model()), ["q_proj", "down_proj", "embed_tokens"], 4, 6.0, use_rslora=True,
        rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 11.0},
    )  # fmt: skip
    with torch.no_grad():
        for A, B in peft_pairs(theirs).values():
            A.normal_(0, 0.2)
            B.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    save_model(tiny_model(), tmp_path / "base")
    found = {m.name: m for m in analysis.measure(read_adapter(tmp_path / "theirs"), tmp_path / "base")}
    for name, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            norm = layer.get_delta_weight("default").double().norm().item()
            assert found.pop(name).norm == pytest.approx(norm, rel=1e-5)
    assert not found


def edit(folder, add=None, remove=(), **config):
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if key not in remove}
    save_file(tensors | (add or {}), folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def key(name: str, factor: str) -> str:
    return f"base_model.model.{name}.lora_{factor}.weight"


@pytest.fixture
def bad(tmp_path):
    save_adapter(adapted("q,down"), tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(capsys, *argv) -> str:
    """The message of a command that ends with exit code 2, printing nothing else."""
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["inspect", *map(str, argv)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    return printed.err.rpartition("error: ")[2]


@pytest.mark.parametrize("change, match", [
    ({"remove": (key(Q0, "B"),)}, f"lacks {key(Q0, 'B')}"),
    ({"remove": (key(Q0, "A"), key(Q0, "B"))}, f"lacks {key(Q0, 'A')}, though .* targets"),
    ({"add": {key(Q0, "B"): torch.zeros(32, 5)}}, f"{key(Q0, 'B')} has shape (32, 5)"),
    ({"add": {key(Q0, "A"): torch.zeros(4)}}, f"{key(Q0, 'A')} has shape (4,)"),
    ({"add": {key(Q0, "B"): torch.full((32, 4), math.nan)}}, f"{key(Q0, 'B')} holds NaN"),
    ({"add": {key(Q0, "B"): torch.zeros(48, 4)}}, "not layers of one model"),
    ({"add": {key("model.layers.0.self_attn.qkv", "A"): torch.zeros(4, 32)}}, "qkv.* fits no layer"),
    ({"add": {key("model.layers.1000.mlp.down_proj", "A"): torch.zeros(4, 32)}}, "1000.* fits no layer"),
    ({"r": 5}, "has rank 4"),
    ({"lora_alpha": "much"}, "lora_alpha"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern is"),
    ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
])  # fmt: skip
def test_a_bad_adapter_is_named(change, match, bad, capsys):
    edit(bad, **change)
    message = refusal(capsys, bad)
    assert str(bad) in message
    assert re.search(match, message) or match in message, message


def test_what_it_brings_along_in_place_of_the_base_model_is_said_or_refused(bad, tmp_path, capsys):
    """Also where there is no update to measure."""
    save_model(tiny_model(), tmp_path / "base")
    head = tiny_model().lm_head.weight.detach().clone()
    head[5] *= 1.2
    edit(bad, add={"base_model.model.lm_head.weight": head})
    with pytest.warns(UserWarning, match="its own lm_head.weight.* 1 of 97 rows differ"):
        main(["inspect", str(bad), "--model", str(tmp_path / "base")])
    capsys.readouterr()
    edit(bad, add={"base_model.model.lm_head.weight": torch.full((97, 32), math.nan)})
    assert "lm_head.weight holds NaN" in refusal(capsys, bad, "--model", tmp_path / "base")
    edit(bad, add={"base_model.model.lm_head.weight": torch.zeros(101, 32)})
    assert "has shape (101, 32), the base model's is (97, 32)" in refusal(capsys, bad, "--model", tmp_path / "base")


def test_dora_is_refused_since_its_update_is_not_of_low_rank(tmp_path, capsys):
    model = tiny_model()
    inject_lora(model, "q", 4, dora=True)
    save_adapter(model, tmp_path / "dora")
    assert "DoRA" in refusal(capsys, tmp_path / "dora")


def test_an_adapter_of_another_base_model(bad, tmp_path, capsys):
    save_model(tiny_model(hidden_size=48, head_dim=12), tmp_path / "other")
    assert "is it an adapter of another model?" in refusal(capsys, bad, "--model", tmp_path / "other")
    save_model(tiny_model(num_hidden_layers=1), tmp_path / "shallow")
    assert "fits no layer" in refusal(capsys, bad, "--model", tmp_path / "shallow")


def test_a_second_adapter_of_another_base_model(bad, tmp_path, capsys):
    other = tiny_model(intermediate_size=64)
    inject_lora(other, "down", 4)
    save_adapter(other, tmp_path / "other")
    assert "not adapters of one base model" in refusal(capsys, bad, "--against", tmp_path / "other")
    save_adapter(adapted("k"), tmp_path / "none")
    assert "no layer in common" in refusal(capsys, bad, "--against", tmp_path / "none")


def test_a_damaged_base_model(bad, tmp_path):
    save_model(tiny_model(), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    for change, match in (
        ({f"{Q0}.weight": torch.full((32, 32), math.inf)}, f"{Q0}.weight holds NaN or infinity"),
        ({f"{Q0}.weight": torch.zeros(32, 31)}, r"has shape \(32, 31\)"),
    ):
        save_file(tensors | change, path)
        with pytest.raises(CheckpointError, match=match):
            analysis.measure(read_adapter(bad), tmp_path / "base")
    save_file({name: tensor for name, tensor in tensors.items() if Q0 not in name}, path)
    with pytest.raises(CheckpointError, match=f"lacks {Q0}.weight"):
        analysis.measure(read_adapter(bad), tmp_path / "base")


# ---- the command ----


def test_flags_that_do_not_go_together(bad, tmp_path, capsys, monkeypatch):
    assert "--model" in refusal(capsys, bad, "--spectra")
    assert "--spectra" in refusal(capsys, bad, "--layers", "0")
    base = ("--model", tmp_path / "base", "--spectra")
    assert "--top is 0" in refusal(capsys, bad, *base, "--top", "0")
    assert "--epsilon is 2" in refusal(capsys, bad, *base, "--epsilon", "2")
    message = refusal(capsys, bad, "--top", "10", "--epsilon", "0.5")
    assert "--top, --epsilon: no effect without --spectra" in message
    assert "no such adapter folder" in refusal(capsys, tmp_path / "nowhere")
    save_model(tiny_model(), tmp_path / "base")
    assert "adapter_config.json: no such file" in refusal(capsys, tmp_path / "base" / "..")
    layers = refusal(capsys, bad, "--model", tmp_path / "base", "--spectra", "--layers", "0,2")
    assert "'2'" in layers and "0,1" in layers
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "exists" in refusal(capsys, bad, "--out", tmp_path / "full")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'llamalora[plots]'" in refusal(capsys, bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_on_the_terminal(folders, capsys):
    root, _ = folders
    one, two, base = (str(root / name) for name in ("one", "two", "base"))
    main(["inspect", one, "--model", base, "--against", two, "--spectra", "--layers", "1,embed", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["matrices"]) == 16 and result["adapter"] == one
    decomposed = {matrix["name"] for matrix in result["matrices"] if "intruders" in matrix}
    assert decomposed == {m["name"] for m in result["matrices"] if m["layer"] == 1 or m["kind"] == "embed"}
    assert Matrix(**result["matrices"][0]).name == "model.embed_tokens"


def test_a_run_folder_means_its_best_adapter(tmp_path, capsys):
    from dataclasses import asdict

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"settings": asdict(Settings(model="m", data="d", out="o", lr=1e-3, batch_tokens=1))})
    )
    assert "best: the run has saved no such model yet" in refusal(capsys, run)
    write_atomically(run / "best", lambda folder: save_adapter(adapted("q"), folder))
    assert inspect.find_adapter(str(run)) == inspect.find_adapter(str(run / "best")) == run / "best"
    message = refusal(capsys, run)
    assert (
        "its base model, m in its config.json (relative" in message and f"--model, or inspect {run / 'best'}" in message
    )
    save_model(tiny_model(), tmp_path / "base")
    # with the base that it names, as with one that is given
    settings = asdict(Settings(model=str(tmp_path / "base"), data="d", out="o", lr=1e-3, batch_tokens=1))
    main(["inspect", str(run), "--model", str(tmp_path / "base")])
    given = capsys.readouterr().out
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    main(["inspect", str(run), "--spectra"])
    assert "intruders" in capsys.readouterr().out
    main(["inspect", str(run)])
    assert capsys.readouterr().out == given and given.startswith("kind") and "amplif." in given
    (run / "config.json").write_text(
        json.dumps({"settings": asdict(Settings(model="m", data="d", out="o", lr=1e-3, batch_tokens=1, method="full"))})
    )
    assert "--method full" in refusal(capsys, run)


def test_no_product_of_the_size_of_the_weight_is_formed(monkeypatch):
    """At 7B the adapter-only part must stay small: every intermediate value has a side of the rank."""
    config = tiny_config()
    largest = 4 * max(config.vocab_size, config.intermediate_size)
    model = adapted()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    factors = [(layer.lora_A.detach(), layer.lora_B.detach()) for layer in lora_layers(model).values()]
    with Watch():
        for A, B in factors:
            analysis.describe(spectrum.singular_values(B, A), 4)
            spectrum.decompose(B, A)
            analysis.compare_factors(A, B, A, B)
    assert sizes and max(sizes) <= largest
